"""Report what this machine can do, what is missing, and the command that mends it.

    rwkv-peft doctor

Exit code 0 if training can run here, else 1. Nothing is changed, but kernels that compile on first use are compiled,
because only that tells whether they work.
"""

import importlib
import io
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from .cli import Parser
from .errors import told
from .files.room import room_at
from .installing import how_to_install
from .memory import main_memory

OK, NOTE, MISSING = "ok", "-", "MISSING"  # as it should be; good to know; training cannot run without it
PYTHONS = ((3, 10), (3, 14))
INSTALL = "pip install -r requirements.txt"
OPTIONAL = (
    ("rwkv-simple", "a second runtime for merged models"),
    ("transformers", "Hugging Face models"),
    ("peft", "Bone as a plug-in of Hugging Face peft"),
    ("bitsandbytes", "quantized bases"),
    ("math-verify", "rwkv-peft eval math"),
    ("lm_eval", "rwkv-peft eval, tasks of the harness"),
    ("wandb", "--wandb"),
)


class Finding(NamedTuple):
    """One line of the report: the thing that was checked, its status, a text, and the remedy or ""."""

    name: str
    status: str
    text: str
    remedy: str = ""


class Requirement(NamedTuple):
    """A package and its bounds, e.g. ((">=", (2, 6)), ("<", (3,)))."""

    name: str
    bounds: tuple[tuple[str, tuple[int, ...]], ...]

    def admits(self, version: str) -> bool:
        """Return whether a version lies within the bounds; only its leading numbers are compared."""
        numbers = version_numbers(version)
        return all(numbers >= bound if sign == ">=" else numbers < bound for sign, bound in self.bounds)

    @property
    def spec(self) -> str:
        return ",".join(sign + ".".join(map(str, bound)) for sign, bound in self.bounds)


def version_numbers(text: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13, 0); () if the text does not begin with a number."""
    return tuple(int(part) for part in re.split(r"[^\d.]", text, maxsplit=1)[0].split(".") if part)


def parse_requirement(line: str) -> Requirement | None:
    """A line of requirements.txt, such as "torch>=2.6,<3  # why" -> Requirement; None for a blank line, a comment, or a
    requirement of older Pythons than this one, such as 'name; python_version < "3.14"'."""
    line, _, marker = line.split("#")[0].replace(" ", "").partition(";")
    limit = re.search(r"python_version<['\"]([\d.]+)", marker)
    if not line or (limit and sys.version_info[:2] >= version_numbers(limit[1])):
        return None
    name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
    bounds = re.findall(r"(>=|<)(\d+(?:\.\d+)*)", line[len(name) :])
    return Requirement(name, tuple((sign, version_numbers(number)) for sign, number in bounds))


def requirements() -> list[Requirement]:
    """The requirements of training, from requirements.txt of the source tree, else from the installed package."""
    path = Path(__file__).resolve().parents[2] / "requirements.txt"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
    else:
        lines = [line for line in metadata.requires("rwkv-peft") or () if "extra ==" not in line]
    return [requirement for requirement in map(parse_requirement, lines) if requirement]


def check_python() -> list[Finding]:
    """Check that the dependencies have wheels for this version of Python."""
    version = sys.version.split()[0]
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return [Finding("python", OK, f"{version}, {sys.executable}")]
    return [
        Finding(
            "python",
            MISSING,
            f"{version}, and 3.10 to 3.14 is needed",
            "python3.13 -m venv .venv && . .venv/bin/activate && " + INSTALL,
        )
    ]


def installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_package(requirement: Requirement) -> Finding:
    """Check that a required package is installed, has a fitting version, and can be imported."""
    name = requirement.name
    if not installed(name):
        return Finding(name, MISSING, "not installed", INSTALL)
    version = metadata.version(name)
    if not requirement.admits(version):
        return Finding(name, MISSING, f"{version}, and {requirement.spec} is needed", INSTALL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            importlib.import_module(name.replace("-", "_"))
    except Exception as error:  # a broken install may raise anything, and the user must see it
        return Finding(
            name,
            MISSING,
            f"{version} does not import: {type(error).__name__}: {error}",
            f"pip install --force-reinstall '{name}{requirement.spec}'",
        )
    return Finding(name, OK, version)


def check_tools() -> Iterator[Finding]:
    """Look for a C++ compiler, ninja and nvcc."""
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    yield (
        Finding("compiler", OK, first_line(compiler, "--version"))
        if compiler
        else Finding(
            "compiler",
            NOTE,
            "no C++ compiler: the fast CPU kernel and the offload strategies need one",
            "apt install g++ (Debian, Ubuntu), or xcode-select --install (macOS)",
        )
    )
    ninja = shutil.which("ninja")
    yield (
        Finding("ninja program", OK, ninja)
        if ninja
        else Finding(
            "ninja program",
            NOTE,
            "not in PATH: DeepSpeed's own operators need it there",
            "activate the environment, or pip install ninja",
        )
    )
    nvcc = shutil.which("nvcc")
    yield Finding(
        "nvcc", OK if nvcc else NOTE, last_release(nvcc) if nvcc else "no CUDA compiler (only GPU machines need one)"
    )


def first_line(program: str, *arguments: str) -> str:
    """The first line that a program prints."""
    return run(program, *arguments).splitlines()[0]


def last_release(nvcc: str) -> str:
    """nvcc's path and release, e.g. "/usr/local/cuda/bin/nvcc, release 12.6"."""
    found = re.search(r"release [\d.]+", run(nvcc, "--version"))
    return f"{nvcc}, {found[0] if found else 'unknown release'}"


def run(program: str, *arguments: str) -> str:
    """Run a program -> its output, its path if it prints nothing, or the reason why it does not run."""
    try:
        return (
            subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30).stdout.strip() or program
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} does not run: {error}"


def check_devices() -> Iterator[Finding]:
    """Look for GPUs, and measure how fast this machine multiplies matrices in each precision."""
    import torch

    from .gpus import refusal

    if words := refusal():
        yield Finding(
            "GPU",
            MISSING,
            f"there is one, and torch {torch.__version__} cannot use it: {words}",
            "update the driver, install a build of torch for an older CUDA, or train with --accelerator cpu",
        )
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            old = gpu.major < 8
            yield Finding(
                f"GPU {index}",
                NOTE if old else OK,
                f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, "
                f"compute capability {gpu.major}.{gpu.minor}" + (": no bf16 hardware" if old else ""),
                "--precision fp32" if old else "",
            )
    elif torch.version.cuda is None:
        yield Finding(
            "GPU",
            NOTE,
            f"torch {torch.__version__} is built without CUDA: training runs on the CPU",
            "pip install --force-reinstall torch (a build with CUDA)" if shutil.which("nvidia-smi") else "",
        )
    else:
        yield Finding(
            "GPU", NOTE, "torch sees none: training runs on the CPU", "if there is one, see that `nvidia-smi` lists it"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        speed = {name: matmul_speed(dtype, device) for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))}
    except RuntimeError as error:  # no code for a card of this age, no memory left, another program's sole use, …
        yield Finding(
            "GPU",
            MISSING,
            f"torch sees one and cannot compute on it: {told(error)}",
            "end what else uses it, take a build of torch that knows it, or train with --accelerator cpu",
        )
        return
    advice = (
        "bf16 is faster and takes half the memory"
        if speed["bf16"] > speed["fp32"]
        else "fp32 is faster, bf16 takes half the memory"
    )
    cores = f" on {torch.get_num_threads()} threads" if device == "cpu" else ""
    yield Finding(
        "--precision",
        OK,
        f"{advice} (matrix products: fp32 {speed['fp32']:,.0f}, bf16 {speed['bf16']:,.0f} GFLOP/s{cores})",
    )


def matmul_speed(dtype: str, device: str, size: int = 1024) -> float:
    """Measure the GFLOP/s of a product of two (size, size) matrices; dtype is the name of a torch dtype."""
    import torch

    a = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def check_kernels() -> Iterator[Finding]:
    """Check the backends of each generation's recurrence; those that can be compiled are."""
    from .models import FAMILIES

    for family in FAMILIES:
        for name, reason in family.kernels().items():
            yield Finding(f"{family.kernel} {name}", OK if reason is None else NOTE, reason or "usable")


def check_deepspeed() -> list[Finding]:
    """Check whether DeepSpeed's CPU Adam, which the offload strategies need, can be compiled on first use."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        from deepspeed.ops.op_builder import CPUAdamBuilder

        builder = CPUAdamBuilder()
        possible = builder.is_compatible(verbose=False)
    if possible and shutil.which("c++") and shutil.which("ninja"):
        return [Finding("DeepSpeed CPUAdam", OK, "compiles on first use of an offload strategy (about a minute)")]
    return [
        Finding(
            "DeepSpeed CPUAdam",
            NOTE,
            "cannot be compiled here: the offload strategies will not run, the others do",
            "apt install g++ (Debian, Ubuntu) && pip install ninja",
        )
    ]


def check_memory() -> Iterator[Finding]:
    """Look at main memory, and at the disk of the current folder."""
    total, free = main_memory()
    if total:
        yield Finding(
            "memory", OK, f"{total / 2**30:.1f} GiB" + (f", {free / 2**30:.1f} GiB available" if free else "")
        )
    disk = room_at(".")
    low = disk < 5 * 2**30
    yield Finding(
        "disk",
        NOTE if low else OK,
        f"{disk / 2**30:.0f} GiB free in {Path.cwd()}"
        + (": a 7B model and its checkpoints need 30 GiB" if low else ""),
    )


def check_optional() -> Iterator[Finding]:
    """Look for packages that only some features need."""
    for name, use in OPTIONAL:
        if installed(name):
            yield Finding(name, OK, metadata.version(name))
        else:
            yield Finding(name, NOTE, f"not installed ({use})", f"pip install {name}")


def examine() -> Iterator[Finding]:
    """Yield every Finding, the cheap ones first; checks that need a missing package or a GPU that fails are left
    out."""
    yield from check_python()
    standing = {}
    for requirement in requirements():
        finding = check_package(requirement)
        standing[requirement.name] = finding.status
        yield finding
    yield from check_tools()
    if standing.get("torch") == OK:
        devices = list(check_devices())
        yield from devices
        if all(finding.status != MISSING for finding in devices):
            yield from check_kernels()
    if standing.get("deepspeed") == OK:
        yield from check_deepspeed()
    yield from check_memory()
    yield from check_optional()


def main(argv: list[str]) -> int:
    """Print the report; -> 0 if nothing that training needs is missing, else 1."""
    Parser(prog="rwkv-peft doctor", description="Say what this machine can do and what is missing.").parse_args(argv)
    if not installed("torch"):  # there is no environment yet, and little to look at
        print(f"no environment: this Python, {sys.executable}, has no torch; {how_to_install()}")
        return 1
    missing = []
    for finding in examine():
        print(f"{finding.name:18} {finding.status:8} {finding.text}", flush=True)
        if finding.remedy:
            print(f"{'':18} {'':8} -> {finding.remedy}")
        if finding.status == MISSING:
            missing.append(finding.name)
    print(f"\ntraining cannot run here: see {', '.join(missing)} above" if missing else "\ntraining can run here")
    return 1 if missing else 0
