"""Short runs of the whole trainer on a GPU (DeepSpeed, Lightning, data, saving): one JSON object a run.

    python benchmarks/gpu_engine.py CASE [--folder out/gpu_check/engine]

x070 and x060 train the demo's base for 10 steps, go on for 10 more, merge and check. A name of SETTINGS trains 10 steps
of the RWKV-7 demo under these flags. "compile" also trains them without --compile, and compares losses and times. "two
GPUs" begin with an empty cache of kernels. In "a rank that raises" rank 1 of two raises at step 3; both have to end
within 15 s, with its message. RWKV-7a is a small random model of that generation; "host memory" trains all of a random
model, and compares main memory in its last step with the most after it; "rewards" learns from answers that a random
model draws, by recorded graphs and without, and compares tokens a second; "large" takes 6 steps of 4096 tokens of 1.6 G
parameters.

Each run is a process of its own, because the engine keeps global state. It reports losses, tokens a second, the peak of
memory beside the plan's, and in "waits" the lines at which training_step and backward waited for the GPU. Exit code 1
if something is wrong, 4 if the machine lacks a GPU that the case needs.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

from common import DEMO, NOT_HERE, ROOT, VERSIONS, Parser, tell, write_tokens

ONE_LINE = ("--bone_mode", "bat-in", "--bone_r", "32", "--micro_bsz", "8")
STAGES = ("stage_2", "stage_3", "stage_2_offload", "stage_3_offload")
SETTINGS = {  # flags of train.py
    **{kind.replace("_", " "): ("--strategy", f"deepspeed_{kind}") for kind in STAGES},
    "grad_cp": ("--grad_cp", "1"),
    "nf4": ("--quant", "nf4"),
    "int8": ("--quant", "int8"),
    "fp32": ("--precision", "fp32"),
    "infctx": ("--train_type", "infctx", "--chunk_ctx", "64"),
    "compile": ("--compile",),
    "two GPUs": ("--devices", "2", "--strategy", "deepspeed_stage_2"),
}
SECONDS, RAISES_AT = 15, 3  # in which all ranks end once one raises, at this step
AGREE = 0.02  # the largest difference of compiled losses, relative
WRONG = "of gpu_check, on purpose"
PROMPTS, ANSWERS = 8, 8  # prompts of a step from which rewards learn, and answers to each


class Case:
    """A case's folder, device and sizes, and the runs that it starts."""

    def __init__(self, name, args):
        self.name, self.args = name, args
        self.folder = args.folder / name.replace(" ", "-")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cpu = args.device == "cpu"

    def data(self):
        """The demo's task as token files, made once for all cases."""
        data = self.args.folder / "data"
        if not data.with_suffix(".idx").exists():
            rows = data.with_suffix(".jsonl")
            python(ROOT / "demo" / "task.py", "finetune", "--documents", self.args.documents, "--output", rows)
            self.command("preprocess", rows, "--tokenizer", "bytes", "--output", data)
        return data

    def command(self, *words):
        """Run a command of rwkv-peft."""
        python(ROOT / "RWKV-PEFT" / "rwkv_peft" / "children.py", "rwkv_peft", *words)

    def random_base(self, version, shape):
        """The file of a random model of "channels x feed-forward channels x layers", written once."""
        path = self.folder / "base.pth"
        if not path.exists():
            make = "import sys; sys.path.insert(0, sys.argv[1]); from gpu_engine import write; write(*sys.argv[2:])"
            python("-c", make, ROOT / "benchmarks", path, version, shape, self.args.vocab, self.args.device)
        return path

    def flags(self, base, data, run, *more):
        device = ("--accelerator", "cpu", "--precision", "fp32") if self.cpu else ("--accelerator", "gpu")
        steps = ("--ctx_len", self.args.ctx_len, "--epoch_steps", self.args.steps, "--epoch_count", 1)
        words = ("--load_model", base, "--data_file", data, "--proj_dir", self.folder / run, *device, *steps, *more)
        return [*map(str, words)]

    def train(self, run="run", base=None, data=None, flags=(), waits=True, say=True, graphs=True):
        """Train, without recorded graphs if not `graphs` -> the result, printed if `say`."""
        words = self.flags(base or DEMO["x070"], data or self.data(), run, *flags)
        measured = self.folder / run / "measured.json"
        began = time.monotonic()
        settings = {"file": str(measured), "waits": waits and not self.cpu, "graphs": graphs}
        python(__file__, "--train", json.dumps(settings), *words)
        seconds = time.monotonic() - began
        lines = [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines]
        rates = sorted(line["tokens_per_s"] for line in lines)
        found = dict(engine=self.name, run=run, seconds=round(seconds, 1), losses=losses)
        found |= dict(tokens_per_s=rates[len(rates) // 2], planned_gib=planned_gib(words))
        found |= json.loads(measured.read_text()) if measured.exists() else {}
        if say:
            tell(**found | {"steps": len(losses), "losses": [losses[0], losses[-1]]})
        if not all(loss == loss and loss < losses[0] + 1 for loss in losses):  # which NaN is not
            raise SystemExit(f"the losses of {self.name} are {losses}")
        return found


def python(*words, **how):
    """Run a program with this folder's package; SystemExit with its exit code if it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, **how)
    if done.returncode:
        raise SystemExit(done.returncode)


def write(path, version, shape, vocabulary, device):
    """Write a random model in bfloat16, made on a device."""
    import torch
    from gpu_models import random_model

    tensors = random_model(version, shape, int(vocabulary), device)[2]
    torch.save({name: x.cpu() for name, x in tensors.items()}, path)


def planned_gib(flags):
    """The plan's peak for a run's flags, without CUDA's context."""
    from rwkv_peft.tools.plan.command import estimate_of, parse_flags
    from rwkv_peft.training.estimate.memory import CONTEXT, CPU, GPU, peak

    device = CPU if "cpu" in flags else GPU
    estimate = estimate_of(parse_flags([word for word in flags if word != "--resume"]), device)
    return round((peak(estimate.parts(), device) - (CONTEXT if device == GPU else 0)) / 2**30, 2)


# --- the cases


def generation(case):
    """Train, go on, merge and check."""
    base, adapter, merged = DEMO[case.name], case.folder / "run" / "adapter.safetensors", case.folder / "merged.pth"
    case.train(base=base, flags=ONE_LINE)
    case.train(base=base, flags=(*ONE_LINE, "--epoch_count", 2, "--resume"))
    files = ("--base_model", base, "--bone_checkpoint", adapter)
    case.command("merge", *files, "--output", merged)
    case.command("check", *files, "--merged", merged)
    tell(engine=case.name, merged_and_checked=True)


def setting(case):
    case.train(flags=(*ONE_LINE, *SETTINGS[case.name]))


def compiled(case):
    """Train with --compile and without."""
    if case.cpu:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # which would compile for a minute
    plain = case.train("plain", flags=ONE_LINE, say=False)
    ours = case.train("compiled", flags=(*ONE_LINE, "--compile"), waits=False)
    apart = max(abs(a / b - 1) for a, b in zip(ours["losses"], plain["losses"]))
    tokens = 8 * case.args.ctx_len
    ms = {found["run"]: round(1e3 * tokens / found["tokens_per_s"], 2) for found in (plain, ours)}
    tell(engine=case.name, ms_a_step=ms, losses_apart=apart, agree=apart <= AGREE)
    return int(apart > AGREE)


def two_gpus(case):
    """Train on two GPUs, whose kernels nobody has built."""
    with tempfile.TemporaryDirectory() as cache:
        if not case.cpu:
            os.environ["XDG_CACHE_HOME"] = cache
        case.train(flags=(*ONE_LINE, *SETTINGS[case.name]), waits=False)


def a_rank_that_raises(case):
    """Let a rank raise -> 1 unless all ranks end in time, with its message."""
    moment = case.folder / "raised"
    words = case.flags(DEMO["x070"], case.data(), "run", *ONE_LINE, *SETTINGS["two GPUs"])
    command = [sys.executable, __file__, "--train", json.dumps({"raises": str(moment)}), *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ended = time.time()
    print(done.stdout)
    seconds, told = ended - float(moment.read_text()), WRONG in done.stdout
    tell(engine=case.name, exit_code=done.returncode, ended_within_s=round(seconds, 1), told=told)
    return int(not (done.returncode and told and seconds <= SECONDS))


def rwkv7a(case):
    """Train a generation whose layers look tokens up in frozen tables."""
    shape = case.args.shape if case.cpu else "1024x3584x12"
    case.train(base=case.random_base("x070a", shape), flags=("--bone_mode", "bat-in", "--bone_r", "32"))


def host_memory(case):
    """Train all of a model, and look at main memory at the end."""
    shape = case.args.shape if case.cpu else "1024x3584x24"
    found = case.train(base=case.random_base("x070", shape), flags=("--peft", "none", "--epoch_save", "0"))
    (case.folder / "base.pth").unlink()
    grown, size = found["host_gib_after"] - found["host_gib_in_last_step"], found["optimizer_gib"]
    tell(engine=case.name, grown_gib=round(grown, 2), optimizer_gib=size)
    return int(grown > 0.5 + 0.5 * size)


def rewards(case):
    """Learn from answers that are drawn by recorded graphs, and without."""
    rows, reward = case.folder / "prompts.jsonl", case.folder / "reward.py"
    rows.write_text(
        "".join(json.dumps({"prompt": f"Q: {number} and {number % 7}?\nA:"}) + "\n" for number in range(99))
    )
    reward.write_text("def reward(completions, **_):\n    return [len(set(text)) / 10 for text in completions]\n")
    base = case.random_base("x070", case.args.shape if case.cpu else "1024x3584x24")
    flags = ["--data_type", "prompts", "--reward", f"{reward}:reward", "--top_p", 0.7, "--num_generations", ANSWERS]
    flags += ["--max_completion_length", case.args.answer_tokens, "--micro_bsz", PROMPTS, "--bone_r", 32]
    flags += ["--tokenizer", "bytes" if case.cpu else "world", "--epoch_save", 0]
    rates, first = {}, {}
    for run, graphs in (("recorded", True), ("plain", False)):
        case.train(run, base, rows, flags, waits=False, say=False, graphs=graphs)
        lines = [json.loads(line) for line in (case.folder / run / "metrics.jsonl").read_text().splitlines()]
        rates[run] = sorted(PROMPTS * ANSWERS * line["length"] / line["draw_s"] for line in lines)[len(lines) // 2]
        drawn = map(json.loads, (case.folder / run / "answers.jsonl").read_text().splitlines())
        first[run] = [answer["completion"] for answer in drawn if answer["step"] == 0]
    base.unlink()
    same = sum(map(str.__eq__, *first.values()))
    tell(
        engine=case.name,
        drawn_tokens_per_s={run: round(rate, 1) for run, rate in rates.items()},
        same_first_answers=f"{same} of {PROMPTS * ANSWERS}",  # in bfloat16 rounding may part them
    )


def large(case):
    """A few steps of long rows of a large model."""
    data = case.folder / "data"
    import torch

    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(1, case.args.vocab, (20, case.args.long + 904), generator=generator).tolist()
    write_tokens(data, case.args.vocab, documents)
    flags = ("--ctx_len", case.args.long, "--bone_mode", "bat-in", "--bone_r", "32", "--epoch_save", "0")
    case.train(base=case.random_base("x070", case.args.shape), data=data, flags=(*flags, "--epoch_steps", 6))
    (case.folder / "base.pth").unlink()


CASES = {
    **dict.fromkeys(VERSIONS, generation),
    **dict.fromkeys(SETTINGS, setting),
    "compile": compiled,
    "two GPUs": two_gpus,
    "a rank that raises": a_rank_that_raises,
    "RWKV-7a": rwkv7a,
    "host memory": host_memory,
    "rewards": rewards,
    "large": large,
}
OF_TWO = ("two GPUs", "a rank that raises")


# --- within the process that trains


def measured(settings, argv):
    """Train by train.py's flags, measured or with a rank that raises -> an exit code."""
    from rwkv_peft.cli import commands
    from rwkv_peft.inference import forward
    from rwkv_peft.training.ranks import group

    # ranks look for modules there alone
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    group.python_command = lambda package, name, *argv: [
        sys.executable, __file__, "--train", json.dumps(settings), *argv
    ]  # fmt: skip
    result = {}
    with ExitStack() as stack:
        if "raises" in settings:
            let_rank_raise(Path(settings["raises"]))
        else:
            look(result, settings["waits"], stack)
            if not settings["graphs"]:
                stack.enter_context(patch.object(forward, "recordable", lambda model: False))
        sys.argv = ["train.py", *argv]
        try:
            code = commands.run("train")
        except SystemExit as end:
            code = end.code
    if "optimizer_gib" in result and os.environ.get("RANK", "0") == "0":  # no launcher of ranks
        result["host_gib_after"] = memory_of_process("VmHWM")
        waits = {f"{each.filename}:{each.lineno}" for each in result.pop("caught") if "synchroniz" in str(each.message)}
        Path(settings["file"]).write_text(json.dumps(result | ({"waits": sorted(waits)} if settings["waits"] else {})))
    return code


def look(result, waits, stack):
    """Record the memory of the last step into `result`, and have forward and backward warn where they wait."""
    import torch

    from rwkv_peft.training import loop
    from rwkv_peft.training.engine import TrainingEngine

    result["caught"] = stack.enter_context(warnings.catch_warnings(record=waits)) or []
    if waits:
        warnings.simplefilter("always")
    forward, add, save = TrainingEngine.forward, loop.StepSums.add, loop.save

    @functools.wraps(forward)
    def noted_forward(self, *arguments):
        if waits:
            torch.cuda.set_sync_debug_mode("warn")
        return forward(self, *arguments)

    @functools.wraps(add)
    def noted_add(self, *arguments):
        if waits:
            torch.cuda.set_sync_debug_mode("default")  # it reads the loss
        return add(self, *arguments)

    @functools.wraps(save)
    def noted_save(run, *arguments):
        saved = save(run, *arguments)
        result["host_gib_in_last_step"] = memory_of_process("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        states = [x for state in run.engine.optimizer.state.values() for x in state.values()]
        result["optimizer_gib"] = round(sum(x.nbytes for x in states if torch.is_tensor(x)) / 2**30, 4)
        if torch.cuda.is_initialized():
            result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return saved

    TrainingEngine.forward, loop.StepSums.add, loop.save = noted_forward, noted_add, noted_save


def memory_of_process(name):
    """VmRSS, or VmHWM (its peak), of this process in GiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return round(int(line.split()[1]) / 2**20, 3)


def let_rank_raise(moment):
    """Let rank 1 raise at RAISES_AT, and write when."""
    from rwkv_peft.training import loop

    take_step = loop.take_step

    def failing_step(run, step, *others):
        if os.environ.get("RANK") == "1" and step == RAISES_AT:
            moment.write_text(str(time.time()))
            raise RuntimeError(WRONG)
        return take_step(run, step, *others)

    loop.take_step = failing_step


QUICK = dict(
    case="x070", device="cpu", ctx_len=128, steps=5, documents=60, long=64, shape="64x224x2", vocab=257, answer_tokens=4
)  # fmt: skip


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--train"]:
        return measured(json.loads(argv[1]), argv[2:])
    parser = Parser(__doc__, **QUICK)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--folder", type=Path, help="what takes data and runs; a temporary one")
    parser.add_argument("--ctx_len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--long", type=int, default=4096, help="tokens of large's rows")
    parser.add_argument("--answer_tokens", type=int, default=64, help="of each answer from which rewards learn")
    parser.add_argument("--shape", default="2048x7168x24", help="channels, feed-forward channels, layers of large")
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(argv)
    if args.case in OF_TWO and args.device == "cuda":
        import torch

        if torch.cuda.device_count() < 2:
            tell(engine=args.case, skipped="one GPU is here")
            return NOT_HERE
    with tempfile.TemporaryDirectory() as folder:
        args.folder = (args.folder or Path(folder)).resolve()
        return CASES[args.case](Case(args.case, args)) or 0


if __name__ == "__main__":
    sys.exit(main())
