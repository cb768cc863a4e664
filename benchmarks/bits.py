"""Digests of what a table of short runs computes: their losses, adapters and merged files, on both demo models.

    python benchmarks/bits.py before.json                       at one commit
    python benchmarks/bits.py after.json --against before.json  at another, on the same machine

A change that moves code and no number gives the same digests; the second call names the runs that differ, and exits
with 1. --root takes another checkout of this repository, --quick two of the runs. Everything runs on one thread.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
COMMON = (
    "--tokenizer bytes --ctx_len 128 --micro_bsz 4 --epoch_steps 6 --epoch_count 1 --accelerator cpu --lr_init 2e-3 "
    "--answer_rows 0 --random_seed 7"
)
TWO_RANKS = "--devices 2 --strategy deepspeed_stage_2"
# name -> (generation of the demo's base, data, flags)
RUNS = {
    "bat-in": (6, "sft", "--precision fp32 --bone_r 16"),
    "bat-in, packed, bf16": (7, "sft", "--precision bf16 --bone_r 16 --dataload pack"),
    "bone, two ranks": (6, "sft", f"--precision fp32 --bone_r 32 --bone_mode bone {TWO_RANKS}"),
    "lora, grad_cp": (7, "sft", '--precision fp32 --peft lora --peft_config {"r":8} --grad_cp 1'),
    "pissa, time and ln": (6, "sft", '--precision bf16 --peft pissa --peft_config {"r":8} --train_parts time ln'),
    "dora, get": (7, "sft", '--precision fp32 --peft dora --peft_config {"r":8} --dataload get'),
    "states": (7, "sft", "--precision fp32 --train_type state"),
    "infinite context": (6, "sft", "--precision fp32 --bone_r 16 --train_type infctx --chunk_ctx 32"),
    "dpo, bat-out": (7, "pairs", "--precision fp32 --bone_r 16 --bone_mode bat-out --objective dpo"),
    "grpo, rslora": (7, "prompts", "--precision fp32 --peft rslora --objective grpo --num_generations 4"),
    "distillation, shira": (6, "sft", "--precision fp32 --peft shira --objective distill --teacher_model {teacher}"),
    "full, two ranks": (7, "sft", f"--precision fp32 --peft none {TWO_RANKS}"),
}
QUICK = ("bat-in", "dpo, bat-out")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name))
        for run in QUICK if args.quick else RUNS:
            found[run] = digests(run, args.root.resolve(), Path(name))
            print(f"{run:24}", *found[run].values(), flush=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    if args.against is None:
        return 0
    before = json.loads(args.against.read_text())
    differ = [run for run in found if found[run] != before.get(run)]
    print(f"differ: {'; '.join(differ)}" if differ else f"{len(found)} runs: the same bits")
    return int(bool(differ))


def write_rows(folder: Path) -> None:
    """Rows of each kind, from the demo's task, and a reward."""
    task = ("finetune", "--documents", "120", "--seed", "1", "--output", folder / "sft.jsonl")
    subprocess.run([sys.executable, ROOT / "demo" / "task.py", *task], check=True)
    rows = [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no\n"} for row in rows]
    prompts = [{"prompt": row["prompt"]} for row in rows]
    for name, kind in (("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kind))
    (folder / "reward.py").write_text(
        "def reward(completions, **_):\n    return [len(set(c)) / 10 for c in completions]\n"
    )


def digests(run: str, root: Path, folder: Path) -> dict[str, str]:
    """{part: digest} of a run's losses, its adapter or model, and the merged file."""
    generation, kind, flags = RUNS[run]
    base, out = root / "demo" / f"rwkv{generation}-demo.pth", folder / run.replace(" ", "-").replace(",", "")
    more = ["--reward", f"{folder / 'reward.py'}:reward", "--max_completion_length", "16"] if kind == "prompts" else []
    command = ["train.py", "--load_model", base, "--data_file", folder / f"{kind}.jsonl", "--data_type", kind]
    teacher = root / "demo" / f"rwkv{13 - generation}-demo.pth"  # the other generation's
    command += ["--proj_dir", out, *COMMON.split(), *flags.replace("{teacher}", str(teacher)).split(), *more]
    call(root, command)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {"losses": digest_of(json.dumps([[line.get("loss"), line.get("grad_norm")] for line in lines]).encode())}
    adapter, model = out / "adapter.safetensors", out / "rwkv.pth"
    if adapter.exists():
        found["adapter"] = digest(load_file(adapter))
        if "--train_type state" not in flags:
            model = out / "merged.pth"
            call(root, ["merge_bone.py", "--base_model", base, "--bone_checkpoint", adapter, "--output", model])
    if model.exists():
        found["model"] = digest(torch.load(model, map_location="cpu", weights_only=True))
    return found


def call(root: Path, command: list[object]) -> None:
    """Run a script of a checkout on one thread; its output is shown if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root / "RWKV-PEFT")}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=root,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed: {' '.join(map(str, command))}")


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """A digest of names, dtypes, shapes and bytes."""
    hashed = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
