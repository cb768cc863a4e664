"""Describes a GPU, and tries and times our kernels on it, mainly the recurrences': one JSON object in each line.

    python benchmarks/gpu_probe.py card       name, driver, clocks, copy bandwidth, the rate of an 8192 x 8192 product
    python benchmarks/gpu_probe.py ready      the kernels as training builds them, all at once: seconds, or why not
    python benchmarks/gpu_probe.py smoke      cases against float64, poisoned memory, 20 equal repetitions
    python benchmarks/gpu_probe.py kernels    microseconds, GB/s, share of the traffic's floor; peers where installed

scripts/gpu_check.sh runs them. Exit code 1 if something is wrong, 2 without a usable GPU.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import gpu_ops
import recurrences
import torch
from common import Parser

from rwkv_peft.ops import cross_entropy, decode
from rwkv_peft.ops.bone.cuda import FAMILY as BONE
from rwkv_peft.ops.mix.cuda import FAMILY as MIX
from rwkv_peft.ops.native.cuda import misfit
from rwkv_peft.ops.recurrence.kernels import CudaRecurrence
from rwkv_peft.ops.wkv6 import WKV6, wkv6
from rwkv_peft.ops.wkv7 import WKV7, wkv7

FAMILIES = (WKV6.cuda.family, WKV7.cuda.family, MIX, BONE, cross_entropy.CUDA, decode.CUDA)
SHAPES = ((8, 4096, 32), (1, 4096, 64), (1, 1024, 32), (8, 1024, 8))  # B, T, H of head size 64
CASES = tuple(
    (N, dtype, packed) for dtype in ("bfloat16", "float32") for N in (64, 128, 32) for packed in (False, True)
)
REPEATS = 20


@dataclass(frozen=True)
class Recurrence:
    """An operation and its CUDA kernels."""

    call: Callable
    kernels: CudaRecurrence

    @property
    def name(self):
        return self.kernels.signature.op

    @property
    def rows(self):
        return self.kernels.signature.rows

    @property
    def others(self):
        return self.kernels.signature.shared


RECURRENCES = (Recurrence(wkv6, WKV6.cuda), Recurrence(wkv7, WKV7.cuda))


def tell(**entry):
    print(json.dumps(entry), flush=True)


def milliseconds(function, repeats=20):
    """The median time of `function` on the GPU, by events."""
    function(), function()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def card():
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        said = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True)
        tell(nvidia_smi=dict(zip(query.split(","), said.stdout.decode().strip().split(", "))))
    except OSError as error:
        tell(nvidia_smi=str(error))
    properties = torch.cuda.get_device_properties(0)
    tell(
        name=properties.name,
        capability=list(torch.cuda.get_device_capability()),
        multiprocessors=properties.multi_processor_count,
        memory_gib=round(properties.total_memory / 2**30, 1),
        torch=torch.__version__,
        cuda=torch.version.cuda,
    )
    tell(copy_gb_s=round(copy_bandwidth()))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tell(matmul_tflop_s=round(2 * 8192**3 / (1e9 * milliseconds(lambda: a @ b))))


def copy_bandwidth():
    """GB a second, read and written, of a copy of 1 GiB."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / 1e6 / milliseconds(lambda: y.copy_(x))


def ready():
    """Build all families' kernels, each in a thread of its own, because most of it is compilers' work."""
    with ThreadPoolExecutor(len(FAMILIES)) as pool:
        return max(pool.map(ready_one, FAMILIES))


def ready_one(family):
    start = time.perf_counter()
    reason = family.unavailable()
    tell(kernels=family.op, usable=reason is None, reason=reason, seconds=round(time.perf_counter() - start, 1))
    return int(reason is not None)


def inputs(op, B, T, H, N, dtype, device="cuda"):
    """([the recurrence's inputs], the gradient of y), with a and b a direction to remove, and the same times a rate."""
    generator = torch.Generator(device=device).manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    found = {name: 0.5 * random(B, T, H, N) for name in "rkv"}
    found["w"] = -6 + 7 * torch.rand(B, T, H, N, generator=generator, device=device)
    direction = torch.nn.functional.normalize(random(B, T, H, N), dim=-1)
    found |= dict(a=-direction, b=0.5 * direction)
    leaves = [found[name].to(dtype).requires_grad_() for name in op.rows]
    leaves += [(0.5 * random(H, N)).requires_grad_() for _ in op.others]
    return leaves, (0.5 * random(B, T, H, N)).to(dtype)


def gradients(op, backend, leaves, gy, bounds, dtype=None):
    """[y, the inputs' gradients] by a backend, in float64."""
    leaves = [x.detach().to(dtype=dtype or x.dtype).requires_grad_() for x in leaves]
    y, _ = op.call(*leaves, cu_seqlens=None if bounds is None else bounds.to(gy.device), backend=backend)
    y.backward(gy.to(y))
    return [x.detach().double() for x in (y, *(leaf.grad for leaf in leaves))]


def poison():
    """Leave NaN in the memory that the allocator gives out next."""
    blocks = [torch.full((2**size,), float("nan"), device="cuda") for size in range(8, 24)]
    torch.cuda.synchronize()
    del blocks


def smoke():
    return max(*map(smoke_one, RECURRENCES), smoke_others())


def smoke_others():
    poison()
    entries = []
    for entry in gpu_ops.check("cuda"):
        tell(**entry)
        entries.append(entry)
    return int(not all(entry["right"] and entry["repeated"] for entry in entries))


def smoke_one(op):
    wrong = 0
    for N, name, packed in CASES:
        dtype = getattr(torch, name)
        leaves, gy = inputs(op, 1, 280, 3, N, dtype)
        bounds = torch.tensor([0, 1, 18, 82, 147, 277, 280]) if packed else None
        truth = gradients(op, "reference", leaves, gy, bounds, torch.float64)
        plain = gradients(op, "reference", leaves, gy, bounds)
        poison()
        ours = gradients(op, "cuda", leaves, gy, bounds)
        repeated = all(
            all(map(torch.equal, ours, gradients(op, "cuda", leaves, gy, bounds))) for _ in range(REPEATS - 1)
        )
        errors = {}
        for what, x, y, exact in zip(("y", *(f"g{x}" for x in (*op.rows, *op.others))), ours, plain, truth):
            scale = exact.norm()
            errors[what] = [float((x - exact).norm() / scale), float((y - exact).norm() / scale)]
        least = 1e-6 if dtype == torch.float32 else 3e-3
        right = all(mine <= 2 * theirs + least for mine, theirs in errors.values())  # NaN is not
        wrong += not (right and repeated)
        tell(
            kernels=op.name,
            head_size=N,
            dtype=name,
            packed=packed,
            right=right,
            repeated=repeated,
            errors_ours_and_torch=errors,
        )
    return int(wrong > 0)


def kernels():
    bandwidth = copy_bandwidth()
    for op in RECURRENCES:
        for shape in SHAPES:
            time_kernels(op, shape, bandwidth)
    head = torch.randn(65536, 2048, device="cuda", dtype=torch.bfloat16)  # larger than any cache
    for bits in decode.BITS:
        blocks = decode.quantize(head, bits)
        runs = {f"{n} rows": (partial(decode.product, head[:n], blocks), blocks.nbytes) for n in (1, 4, 16)}
        time_runs(f"blocks of {bits} bits,", runs, head, bandwidth)


def time_kernels(op, shape, bandwidth):
    B, T, H = shape
    leaves, gy = inputs(op, B, T, H, 64, torch.bfloat16)
    time_directions(op.name, op.kernels, [x.detach() for x in leaves], gy, bandwidth)
    peers(op, shape, leaves, gy)


def time_directions(name, recurrence, tensors, gy, bandwidth, **further):
    """Time forward and backward of a CudaRecurrence, beside the time of their traffic at `bandwidth`, in GB/s."""
    checkpoints = recurrence.forward(*tensors, None, None, save=True, **further)[2]
    elements, states = gy.numel() * gy.element_size(), checkpoints.numel() * 4
    rows = len(recurrence.signature.rows)
    runs = {
        "forward": (
            lambda: recurrence.forward(*tensors, None, None, save=True, **further),
            (rows + 1) * elements + states,
        ),
        "backward": (
            lambda: recurrence.backward(*tensors, None, None, checkpoints, gy, None, **further),
            (2 * rows + 1) * elements + states,
        ),
    }
    time_runs(name, runs, gy, bandwidth)


def time_runs(name, runs, gy, bandwidth):
    """Time {direction: (function, bytes)}, and print that beside the time of the bytes at `bandwidth`, in GB/s."""
    for direction, (function, traffic) in runs.items():
        time_ = milliseconds(function)
        floor = traffic / 1e6 / bandwidth
        tell(
            shape=list(gy.shape[:3]),
            kernel=f"{name} {direction}",
            us=round(1e3 * time_, 1),
            gb_s=round(traffic / 1e6 / time_),
            floor_us=round(1e3 * floor, 1),
            of_floor=round(floor / time_, 2),
        )


def peers(op, shape, leaves, gy):
    """Forward and backward through autograd: ours and others'."""
    for name, function in recurrences.contenders(op.name, "cuda").items():
        if name == recurrences.SLOW:
            continue

        def both(function=function):
            for x in leaves:
                x.grad = None
            function(*leaves).backward(gy)

        tell(
            shape=list(shape),
            kernel=op.name,
            forward_and_backward=name,
            us=round(1e3 * milliseconds(both, repeats=5), 1),
        )


PROBES = {"card": card, "ready": ready, "smoke": smoke, "kernels": kernels}


def main(argv=None):
    parser = Parser(__doc__, probe="card")
    parser.add_argument("probe", choices=PROBES)
    args = parser.parse_args(argv)
    reason = misfit()
    if reason is not None:
        tell(gpu=reason)
        return 2
    return PROBES[args.probe]() or 0


if __name__ == "__main__":
    sys.exit(main())
