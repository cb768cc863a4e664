"""Check the devices: how fast they compute, and which kernels run on them."""

import io
import shutil
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout

from ..errors import told
from .finding import MISSING, NOTE, OK, Finding


def check_devices() -> Iterator[Finding]:
    """Look for GPUs, and measure how fast this machine multiplies matrices in each precision."""
    import torch

    from ..gpus import refusal

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
            "end other programs that use it, take a build of torch that knows it, or train with --accelerator cpu",
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
    from ..models import FAMILIES

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
