"""A short run of the whole trainer on a GPU (DeepSpeed, Lightning, data, saving), of one generation or of one setting.

    python benchmarks/gpu_engine.py CASE --folder out/gpu_check [--part resume]

The cases x070 and x060 train the demo's base for 10 steps; --part resume then goes on for 10 more, and --part merge
merges and checks the merged model. A setting of gpu_check_steps.py trains 10 steps of the RWKV-7 demo under it. "large"
is 6 steps of 4096 tokens of a random RWKV-7 of 1.6 G parameters. One JSON object a run: its losses, tokens a second,
the memory that it took and the plan's, and in "waits" the lines at which training_step and backward waited for the GPU.
Exit code 4 if the machine lacks what the setting needs.
"""

import functools
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from common import Parser
from gpu_check_steps import DEMO, GENERATIONS, NOT_HERE, ROOT, SETTINGS
from gpu_models import SHAPE, VOCABULARY, peak_gib, random_model, reset_peak, tell, without_room

from rwkv_peft.cli import commands
from rwkv_peft.cli.errors import exit_on_user_error
from rwkv_peft.data.shard_writer import ShardWriter

SHORT = ("--bone_mode", "bat-in", "--bone_r", "32", "--ctx_len", "256", "--micro_bsz", "8")
STEPS = ("--epoch_steps", "10", "--epoch_count")


def command(*argv):
    """Run a command of the package in this process; SystemExit if it fails."""
    if code := commands.main([*map(str, argv)]):
        raise SystemExit(code)


def data_of(folder):
    """The demo's task as token files, made once."""
    data = folder / "data"
    if not data.with_suffix(".idx").exists():
        task = ("finetune", "--documents", "400", "--output", str(folder / "data.jsonl"))
        subprocess.run([sys.executable, str(ROOT / "demo" / "task.py"), *task], check=True)
        command("preprocess", folder / "data.jsonl", "--tokenizer", "bytes", "--output", data)
    return data


def planned_gib(flags):
    """The plan's peak for a run's flags, without CUDA's context."""
    from rwkv_peft.tools.plan.command import estimate_of, parse_flags
    from rwkv_peft.tools.plan.memory import CONTEXT, GPU, peak

    estimate = estimate_of(parse_flags([*map(str, flags)]), GPU)
    return round((peak(estimate.parts(), GPU) - CONTEXT) / 2**30, 2)


def listening():
    """Let training_step, and the hook before backward's result is read, report where they wait for the GPU."""
    from rwkv_peft.training.step.lit import Lit

    step, after = Lit.training_step, Lit.on_after_backward

    @functools.wraps(step)
    def training_step(self, *arguments):
        torch.cuda.set_sync_debug_mode("warn")
        return step(self, *arguments)

    @functools.wraps(after)
    def on_after_backward(self):
        torch.cuda.set_sync_debug_mode("default")  # it reads the loss
        return after(self)

    Lit.training_step, Lit.on_after_backward = training_step, on_after_backward


def train(case, base, data, run, device, *flags):
    """Train, and print the result."""
    listened = device != "cpu" and "--compile" not in flags
    accelerator = ("--accelerator", "cpu" if device == "cpu" else "gpu")
    given = ("--load_model", base, "--data_file", data, "--proj_dir", run, *accelerator, *flags)
    reset_peak(device)
    with warnings.catch_warnings(record=listened) as caught:
        if listened:
            listening()
            warnings.simplefilter("always")
        command("train", *given)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    waits = sorted({f"{one.filename}:{one.lineno}" for one in caught or () if "synchroniz" in str(one.message)})
    tell(
        engine=case,
        steps=len(lines),
        losses=[losses[0], losses[-1]],
        tokens_per_s=sorted(line["tokens_per_s"] for line in lines)[len(lines) // 2],
        planned_gib=planned_gib([x for x in given if x != "--resume"]),
        **peak_gib(device),
        **({"waits": waits} if listened else {}),
    )
    if not all(loss == loss and loss < losses[0] + 1 for loss in losses):
        raise SystemExit(f"the losses of {case} are {losses}")


def generation(version, part, folder, device):
    """A part of training, resuming, merging and checking on the demo's base of a generation."""
    base, run = DEMO[version], folder / version
    if part == "merge":
        merged = ("--base_model", base, "--bone_checkpoint", run / "adapter.safetensors")
        command("merge", *merged, "--output", folder / f"{version}.pth")
        command("check", *merged, "--merged", folder / f"{version}.pth")
        tell(engine=version, merged_and_checked=True)
        return
    flags = (2, "--resume") if part == "resume" else (1,)
    train(version, base, data_of(folder), run, device, *SHORT, *STEPS, *flags)


def large(folder, device, shape=SHAPE):
    """A few steps of 4096 tokens of a large random model, whose file is removed again."""
    base, data = folder / "large.pth", folder / "large"
    torch.save({name: x.cpu() for name, x in random_model("x070", shape, VOCABULARY, device)[2].items()}, base)
    with ShardWriter(data, vocab_size=VOCABULARY) as writer:
        for document in torch.randint(1, VOCABULARY, (20, 5000), generator=torch.Generator().manual_seed(0)):
            writer.add(document.tolist())
    try:
        flags = ("--ctx_len", "4096", "--bone_mode", "bat-in", "--epoch_steps", "6", "--epoch_save", "0")
        train("large", base, data, folder / "run-large", device, *flags)
    finally:
        base.unlink()


def setting(case, folder, device):
    """Ten steps under a setting."""
    if case == "two GPUs" and torch.cuda.device_count() < 2:
        tell(engine=case, skipped="one GPU is here")
        return NOT_HERE
    run = folder / case.replace(" ", "-")
    train(case, DEMO["x070"], data_of(folder), run, device, *SHORT, *STEPS, 1, *SETTINGS[case])
    return 0


def main(argv=None):
    parser = Parser(__doc__, case="x070", device="cpu", folder=None)
    parser.add_argument("case", choices=(*GENERATIONS, "large", *SETTINGS))
    parser.add_argument("--part", choices=("train", "resume", "merge"), default="train", help="of a generation's case")
    parser.add_argument("--folder", type=Path, required=True, help="its folder engine/ takes data and runs")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(argv)
    folder = (args.folder or Path(tempfile.mkdtemp())).resolve() / "engine"
    folder.mkdir(parents=True, exist_ok=True)
    if args.case in SETTINGS:
        return without_room(lambda: setting(args.case, folder, args.device), engine=args.case)
    work = functools.partial(generation, args.case, args.part) if args.case in GENERATIONS else large
    return without_room(lambda: work(folder, args.device), engine=args.case)


if __name__ == "__main__":
    exit_on_user_error(main)
