"""The steps of gpu_check.py, the most important first, in case the machine is taken away.

The first smoke run is of the kernels that training takes; then come the steps of training, the engine, decoding; then
everything else. Each step is a process of its own, so that its failure does not affect others. Needs only Python.
"""

import shutil
import sys
from dataclasses import dataclass
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT_OF_MEMORY, NOT_HERE = 3, 4  # exit codes of a step's program, which has told more
DEMO = {f"x0{n}0": ROOT / "demo" / f"rwkv{n}-demo.pth" for n in (6, 7)}
ENGINE = ("deepspeed", "lightning", "safetensors", "numpy", "tqdm")
MODULES = {"gpu_smoke": ("numpy",), "gpu_steps": ("numpy", "tqdm")}  # that programs need besides torch
GENERATIONS, METHODS = ("x070", "x060"), ("bat-in", "bone", "lora")
QUANTIZED = ("nf4", "int8")
STAGES = ("2", "3", "2 offload", "3 offload")
SETTINGS = {  # cases of gpu_engine.py: flags of train.py
    **{f"stage {kind}": ("--strategy", f"deepspeed_stage_{kind.replace(' ', '_')}") for kind in STAGES},
    "grad_cp": ("--grad_cp", "1"),
    "compile": ("--compile",),
    "nf4": ("--quant", "nf4"),
    "int8": ("--quant", "int8"),
    "fp32": ("--precision", "fp32"),
    "infctx": ("--train_type", "infctx", "--chunk_ctx", "64"),
    "two GPUs": ("--devices", "2", "--strategy", "deepspeed_stage_2"),
}
SMALL = ("--methods", "bat-in", "--tokens", "200", "--repeats", "1")
SANITIZED = {  # a family of kernels: what runs them under compute-sanitizer
    **{f"wkv{n}": ("gpu_smoke", "--generations", f"x0{n}0", *SMALL) for n in (7, 6)},
    **dict.fromkeys(("mix", "bone", "cross_entropy", "decode"), ("gpu_ops", "--repeats", "1")),
}
TOOLS = ("memcheck", "racecheck", "synccheck")
ON_GPUS = ("tests/ops/test_backends.py",)  # whose tests of "cuda" need a card


@dataclass(frozen=True)
class Step:
    """Commands that run one after the other, for at most `seconds`, if their programs and modules are installed."""

    name: str
    seconds: int
    commands: tuple
    programs: tuple = ()
    modules: tuple = ("torch",)

    def missing(self):
        """The programs and modules that this machine lacks."""
        invalidate_caches()  # a step installs modules
        programs = [Path(word).stem for command in self.commands for word in command]
        modules = [*self.modules, *(name for program in programs for name in MODULES.get(program, ()))]
        return [name for name in self.programs if shutil.which(name) is None] + [
            name for name in dict.fromkeys(modules) if find_spec(name) is None
        ]

    def named(self, words):
        """True if its name, or the kind that it begins with, is one of the words: "step" means all training steps."""
        return self.name in words or self.name.split()[0] in words


def program(name, *arguments):
    """The command of a program of this folder."""
    return (sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments)


def steps(folder, full, offline=True):
    """The Steps, in order; `folder` takes what they write. Unless offline, one installs what those behind it need."""
    packages = Step("packages", 180, (("sh", str(ROOT / "scripts" / "setup.sh"), "test"),))
    return (
        *first(),
        *steps_of_training(),
        *(engine(case, folder, 120) for case in GENERATIONS),
        *(Step(f"decode {version}", 90, (program("gpu_decode", version),)) for version in GENERATIONS),
        engine("large", folder, 150),
        *(() if offline else (packages,)),
        *rest(folder),
        *(
            [Step("suite", 3600, (pytest("tests", "--accelerator", "gpu"),), modules=("pytest", *ENGINE))]
            if full
            else ()
        ),
    )


def first():
    """The steps that decide if anything else is worth its time."""
    return (
        Step("card", 60, (program("gpu_probe", "card"),)),
        Step("build", 120, (program("gpu_probe", "ready"),)),
        *(Step(f"smoke {version}", 45, (program("gpu_smoke", "--generations", version),)) for version in GENERATIONS),
        sanitizing("memcheck", "wkv7", TOOLS[:1]),
    )


def steps_of_training():
    """Steps of the methods and generations that people train, each by itself: one may run out of memory."""
    return tuple(
        Step(f"step {version} {method}", 60, (program("gpu_steps", version, method),))
        for version in GENERATIONS
        for method in METHODS
    )


def rest(folder):
    """The other steps, the most instructive first."""
    profile = ("--methods", "bat-in", "--models", *GENERATIONS, "--shapes", "2048x7168x24", "--dtypes", "bf16")
    large = ("--tokens", "4096", "--rounds", "2", "--profile", "30")
    return (
        Step("above 2^31", 60, (program("gpu_above"),)),
        Step("every kernel", 120, (program("gpu_probe", "smoke"),)),
        *(engine(case, folder, 90) for case in SETTINGS),
        *(
            Step(f"more {version} {method} {dtype}", 60, (program("gpu_steps", version, method, *flags),))
            for version in GENERATIONS
            for method, dtype, flags in (
                ("bat-in", "8 x 4096", ("--rows", "8x4096")),
                ("bat-in", "fp32", ("--dtype", "fp32", "--rows", "1x1024")),
                ("none", "1 x 1024", ("--rows", "1x1024")),
            )
        ),
        Step("kernels", 90, (program("gpu_probe", "kernels"),)),
        Step("profile", 90, (program("step", *profile, *large),)),
        *(sanitizing(f"sanitizer {family}", family, TOOLS) for family in SANITIZED),
        Step("tests", 180, (pytest(*ON_GPUS, "-k", "cuda"),), modules=("pytest", "hypothesis")),
    )


def engine(case, folder, seconds):
    """The Step of a case of gpu_engine.py."""
    modules = (*ENGINE, "bitsandbytes") if case in QUANTIZED else ENGINE
    parts = (("--part", "resume"), ("--part", "merge")) if case in GENERATIONS else ()
    run = program("gpu_engine", case, "--folder", str(folder))
    return Step(f"engine {case}", seconds, (run, *((*run, *part) for part in parts)), modules=modules)


def pytest(*arguments):
    """The command that runs some of the tests."""
    # gpu_check.py starts it with cwd=ROOT
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def sanitizing(name, family, tools):
    """The Step that runs a family's kernels under some of compute-sanitizer's tools, which watch no others. Each tensor
    has memory of its own, so that an access outside it is seen."""
    watched = ("compute-sanitizer", "--error-exitcode", "1", "--kernel-name", f"kns={family}")
    runs = tuple(
        ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *watched, "--tool", tool, *program(*SANITIZED[family]))
        for tool in tools
    )
    return Step(name, 120, runs, programs=("compute-sanitizer",))
