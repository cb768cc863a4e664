"""Check what the machine has besides packages: compilers, memory, disk, and devices, how fast they compute, and which
kernels run on them."""

import io
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from ...checkpoints.atomic import room_at
from ...cli.errors import told
from ...memory import main_memory
from .packages import MISSING, NOTE, OK, Finding


def check_devices() -> Iterator[Finding]:
    """Look for GPUs, and measure how fast this machine multiplies matrices in each precision."""
    import torch

    from ...gpus import refusal, without_code

    reason, remedy = refusal()
    if reason:
        text = f"there is one, and torch {torch.__version__} cannot use it: {reason}"
        yield Finding("GPU", MISSING, text, f"{remedy}, or train with --accelerator cpu")
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            text = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
            lacking, remedy = without_code(index)
            if lacking:
                yield Finding(f"GPU {index}", NOTE, lacking, remedy)
            elif gpu.major < 8:
                yield Finding(f"GPU {index}", NOTE, f"{text}: it multiplies bf16 slowly", "--precision fp16")
            else:
                yield Finding(f"GPU {index}", OK, text)
    elif torch.version.cuda is None:
        remedy = "pip install --force-reinstall torch (a build with CUDA)" if shutil.which("nvidia-smi") else ""
        text = f"torch {torch.__version__} is built without CUDA: training runs on the CPU"
        yield Finding("GPU", NOTE, text, remedy)
    else:
        remedy = "if there is one, see that `nvidia-smi` lists it"
        yield Finding("GPU", NOTE, "torch sees none: training runs on the CPU", remedy)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        speed = {name: matmul_speed(dtype, device) for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))}
    except RuntimeError as error:  # no code for a card of this age, no memory left, another program's sole use, …
        remedy = "end other programs that use it, take a build of torch that knows it, or train with --accelerator cpu"
        yield Finding("GPU", MISSING, f"torch sees one and cannot compute on it: {told(error)}", remedy)
        return
    faster = speed["bf16"] > speed["fp32"]
    advice = "bf16 is faster and takes" if faster else "fp32 is faster, bf16 takes"
    cores = f" on {torch.get_num_threads()} threads" if device == "cpu" else ""
    measured = f"matrix products: fp32 {speed['fp32']:,.0f}, bf16 {speed['bf16']:,.0f} GFLOP/s{cores}"
    yield Finding("--precision", OK, f"{advice} half the memory ({measured})")


def matmul_speed(dtype: str, device: str, size: int = 1024) -> float:
    """Measure the GFLOP/s of a product of two (size, size) matrices, as models compute it; dtype is the name of a
    torch dtype."""
    import torch

    from ...ops.products import matmul

    a = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        matmul(a, a)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def check_kernels() -> Iterator[Finding]:
    """Check the backends of each recurrence; those that can be compiled are."""
    from ...models import FAMILIES

    backends = {family.kernel: family.kernels() for family in FAMILIES}
    for kernel, found in backends.items():
        for name, reason in found.items():
            yield Finding(f"{kernel} {name}", OK if reason is None else NOTE, reason or "usable")


def check_deepspeed() -> list[Finding]:
    """Check whether DeepSpeed's CPU Adam, which the offload strategies need, can be compiled on first use."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        from deepspeed.ops.op_builder import CPUAdamBuilder

        builder = CPUAdamBuilder()
        possible = builder.is_compatible(verbose=False)
    if possible and shutil.which("c++") and shutil.which("ninja"):
        text = "compiles on first use of an offload strategy (about a minute)"
        return [Finding("DeepSpeed CPUAdam", OK, text)]
    text = "cannot be compiled here: the offload strategies will not run, the others do"
    remedy = "apt install g++ (Debian, Ubuntu) && pip install ninja"
    return [Finding("DeepSpeed CPUAdam", NOTE, text, remedy)]


def check_tools() -> Iterator[Finding]:
    """Look for a C++ compiler and ninja."""
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler:
        yield Finding("compiler", OK, run(compiler, "--version").splitlines()[0])
    else:
        missing = "no C++ compiler: the fast CPU kernel and the offload strategies need one"
        yield Finding("compiler", NOTE, missing, "apt install g++ (Debian, Ubuntu), or xcode-select --install (macOS)")
    if ninja := shutil.which("ninja"):
        yield Finding("ninja program", OK, ninja)
    else:
        missing = "not in PATH: DeepSpeed's own operators need it there"
        yield Finding("ninja program", NOTE, missing, "activate the environment, or pip install ninja")


def run(program: str, *arguments: str) -> str:
    """Run a program -> its output, its path if it prints nothing, or the reason why it does not run."""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} does not run: {error}"
    return done.stdout.strip() or program


def check_memory() -> Iterator[Finding]:
    """Look at main memory, and at the disk of the current folder."""
    total, free = main_memory()
    if total:
        available = f", {free / 2**30:.1f} GiB available" if free else ""
        yield Finding("memory", OK, f"{total / 2**30:.1f} GiB{available}")
    disk = room_at(".")
    low = disk < 5 * 2**30
    need = ": a 7B model and its checkpoints need 30 GiB" if low else ""
    yield Finding("disk", NOTE if low else OK, f"{disk / 2**30:.0f} GiB free in {Path.cwd()}{need}")
