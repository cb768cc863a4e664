"""Digests of what a table of short runs computes: their losses, adapters and merged files, on both demo models.

    python benchmarks/bits.py --against HEAD~3                  this checkout, and that commit
    python benchmarks/bits.py before.json --root OLD            another checkout or commit, by this table of runs
    python benchmarks/bits.py after.json --against before.json  this checkout, and those digests

A change that moves code and no number gives the same digests. With --against, the runs that differ are named, and the
exit code is 1 if there are any. Other processors round otherwise. --quick takes two of the runs, --only
those with a text in their names. Each process has one thread; products of bfloat16 are converted to float32 ones.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
COMMON = (
    "--tokenizer bytes --ctx_len 128 --micro_bsz 4 --epoch_steps 4 --epoch_count 1 --accelerator cpu --lr_init 2e-3 "
    "--answer_rows 0 --random_seed 7"
)
TWO_RANKS = "--devices 2 --strategy deepspeed_stage"
LORA = '--peft lora --peft_config {"r":8}'
THREE = "--precision bf16 --bone_r 16 --micro_bsz 2 --accumulate_grad_batches 3"
RESUMED = "--resume --epoch_count 2"  # by a second command, for the runs of that name
# name -> (generation of the demo's base, data, flags)
RUNS = {
    "bat-in": (6, "sft", "--precision fp32 --bone_r 16"),
    "bat-in, packed, bf16": (7, "sft", "--precision bf16 --bone_r 16 --dataload pack"),
    "bone, two ranks": (6, "sft", f"--precision fp32 --bone_r 32 --bone_mode bone {TWO_RANKS}_2"),
    "lora, grad_cp": (7, "sft", f"--precision fp32 {LORA} --grad_cp 1"),
    "pissa, time and ln": (6, "sft", '--precision bf16 --peft pissa --peft_config {"r":8} --train_parts time ln'),
    "dora, get": (7, "sft", '--precision fp32 --peft dora --peft_config {"r":8} --dataload get'),
    "states": (7, "sft", "--precision fp32 --train_type state"),
    "infinite context": (6, "sft", "--precision fp32 --bone_r 16 --train_type infctx --chunk_ctx 32"),
    "dpo, bat-out": (7, "pairs", "--precision fp32 --bone_r 16 --bone_mode bat-out --objective dpo"),
    "grpo, rslora": (7, "prompts", "--precision fp32 --peft rslora --num_generations 4"),
    "distillation, lora": (6, "sft", f"--precision fp32 {LORA} --objective distill --teacher_model {{teacher}}"),
    "full, two ranks": (7, "sft", f"--precision fp32 --peft none {TWO_RANKS}_2"),
    "accumulation, bf16, stage 1": (6, "sft", f"{THREE} --strategy deepspeed_stage_1"),
    "accumulation, bf16, stage 2": (6, "sft", f"{THREE} --strategy deepspeed_stage_2"),
    "accumulation, bf16, stage 1, two ranks": (6, "sft", f"{THREE} {TWO_RANKS}_1"),
    "fp16": (6, "sft", "--precision fp16 --bone_r 16"),
    "muon": (7, "sft", f"--precision fp32 {LORA} --optim muon"),
    "muon, two ranks": (7, "sft", f"--precision bf16 --bone_r 16 --optim muon {TWO_RANKS}_2"),
    "adamw8bit": (6, "sft", "--precision bf16 --bone_r 16 --optim adamw8bit"),
    "dpo, stage 3, two ranks": (7, "pairs", f"--precision bf16 --bone_r 16 --objective dpo {TWO_RANKS}_3"),
    "grpo, reused draws": (7, "prompts", "--precision bf16 --bone_r 16 --num_generations 4 --num_iterations 2"),
    "resumed": (6, "sft", "--precision bf16 --bone_r 16 --epoch_steps 2"),
    "resumed, fp16, muon": (7, "sft", "--precision fp16 --bone_r 16 --epoch_steps 2 --optim muon"),
}
QUICK = ("bat-in", "dpo, bat-out")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--against", metavar="FILE|COMMIT")
    parser.add_argument("--root", default=str(ROOT), metavar="FOLDER|COMMIT")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", metavar="TEXT")
    args = parser.parse_args()
    runs = [run for run in (QUICK if args.quick else RUNS) if args.only in run]
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name))
        after = measure(args.root, runs, Path(name))
        if args.output:
            args.output.write_text(json.dumps(after, indent=1) + "\n")
        if args.against is None:
            return 0
        file = Path(args.against)
        before = json.loads(file.read_text()) if file.is_file() else measure(args.against, runs, Path(name))
    different = differences(before, after)
    print(f"differ: {'; '.join(different)}" if different else f"{len(runs)} runs: the same bits")
    return int(bool(different))


def differences(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """The names of the runs of `after` with other digests before, each with the parts that differ."""
    if before["machine"] != after["machine"]:
        sys.exit(f"digests of another machine are not compared: {before['machine']}, {after['machine']}")
    return [
        f"{run} ({', '.join(part for part in parts if before.get(run, {}).get(part) != parts[part])})"
        for run, parts in after.items()
        if parts != before.get(run)
    ]


def measure(source: str, runs: list[str], folder: Path) -> dict[str, dict[str, str]]:
    """{run: {part: digest}} of a checkout's folder or a commit, and the machine that computed them."""
    root = checkout(source, folder)
    products = Path(tempfile.mkdtemp(dir=folder))
    # two at a time, because most runs have one thread
    with ThreadPoolExecutor(2) as pool:
        computed = {}
        for run, parts in zip(runs, pool.map(lambda run: digests(run, root, folder, products), runs)):
            computed[run] = parts
            print(f"{run:40}", *parts.values(), flush=True)
    return {"machine": {"processor": processor(), "torch": torch.__version__}} | computed


def checkout(source: str, folder: Path) -> Path:
    """The root of a checkout: a folder as it is, or the files of a commit in a folder of their own."""
    if Path(source).is_dir():
        return Path(source).resolve()
    archive = subprocess.run(["git", "-C", ROOT, "archive", source], stdout=subprocess.PIPE)
    if archive.returncode:
        sys.exit(f"{source}: no file, no folder, and no commit of this repository")
    root = Path(tempfile.mkdtemp(dir=folder))
    subprocess.run(["tar", "-x", "-C", root], input=archive.stdout, check=True)
    return root


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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


def digests(run: str, root: Path, folder: Path, products: Path) -> dict[str, str]:
    """{part: digest} of a run's losses, its adapter or model, and the merged file. `folder` has the rows."""
    generation, kind, flags = RUNS[run]
    base, out = root / "demo" / f"rwkv{generation}-demo.pth", products / run.replace(" ", "-").replace(",", "")
    more = ["--reward", f"{folder / 'reward.py'}:reward", "--max_completion_length", "16"] if kind == "prompts" else []
    command = ["train.py", "--load_model", base, "--data_file", folder / f"{kind}.jsonl", "--data_type", kind]
    teacher = root / "demo" / f"rwkv{13 - generation}-demo.pth"  # the other generation's
    command += ["--proj_dir", out, *COMMON.split(), *flags.replace("{teacher}", str(teacher)).split(), *more]
    call(root, command)
    if run.startswith("resumed"):
        call(root, [*command, *RESUMED.split()])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    computed = {"losses": digest_of(json.dumps([[line.get("loss"), line.get("grad_norm")] for line in lines]).encode())}
    adapter, model = out / "adapter.safetensors", out / "rwkv.pth"
    if adapter.exists():
        computed["adapter"] = digest(load_file(adapter))
        if "--train_type state" not in flags:
            model = out / "merged.pth"
            call(root, ["merge_bone.py", "--base_model", base, "--bone_checkpoint", adapter, "--output", model])
    if model.exists():
        computed["model"] = digest(torch.load(model, map_location="cpu", weights_only=True))
    return computed


def call(root: Path, command: list[object]) -> None:
    """Run a script of a checkout on one thread; its output is shown if it fails."""
    # Without AVX-512 every processor takes one row of products: bfloat16 is converted, torch multiplies float32.
    forced = {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    environment = os.environ | forced | {"PYTHONPATH": str(root / "RWKV-PEFT")}
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
