"""wkv7's speed and memory: our kernel, the chunked form in plain torch, and plain torch step by step; on a GPU
flash-linear-attention too, if installed.

    python benchmarks/wkv7.py [--device cpu|cuda] [--dtype float32|bfloat16] [--shape B,T,H ...] [--rounds 5]
                              [--threads N]

Forward, and forward and backward through autograd, N = 64. Each round runs every contender once, one after another, so
that other work on the machine slows all of them alike; times are medians over rounds, ratios the medians of a round's
ratios to the kernel. Memory is the peak beyond the inputs, on the CPU in a process of its own. There, a last table has
the CPU kernel on one core, without torch around it, in the core's own time: nanoseconds for each token and head, and
the part of the core's multiply-add peak, counting 9 operations for each state element and step forward and 19 backward,
as many as the recurrence takes step by step.
"""

import argparse
import functools
import multiprocessing
import statistics
import sys
import time

import torch
from wkv6 import fma_peak, memory_of  # beside this file

from rwkv_peft.memory import keep_freed_memory
from rwkv_peft.ops.wkv7 import backends, wkv7
from rwkv_peft.ops.wkv7.cpu import RECURRENCE as kernel
from rwkv_peft.ops.wkv7.reference import DECAY_SCALE

HEAD_SIZE = 64
SHAPES = {  # B,T,H
    "cpu": ("1,1024,4", "1,1024,32", "1,16384,4"),
    "cuda": ("1,1024,32", "1,4096,64", "8,4096,32"),  # the last fills a GPU: 256 heads
}
NOMINAL_FORWARD, NOMINAL_BACKWARD = 9, 19
SLOW = ("torch, step by step",)  # measured once, up to MOST_STEPS of batch x time x heads
MOST_STEPS = 1 << 15


def contenders(device):
    """name -> function(r, w, k, v, a, b) -> y, our kernel first if it works."""
    names = {device: f"ours, {device}", "chunked": "torch, chunks", "reference": SLOW[0]}
    found = {
        title: lambda *inputs, backend=backend: wkv7(*inputs, backend=backend)[0]
        for backend, title in names.items()
        if backends()[backend] is None
    }
    try:
        from fla.ops.rwkv7 import chunk_rwkv7
    except ImportError:
        return found
    if device == "cuda":
        found["fla, chunk"] = lambda r, w, *others: chunk_rwkv7(r, DECAY_SCALE * torch.sigmoid(w), *others)[0]
    return found


def random_inputs(shape, dtype, device):
    """([r, w, k, v, a, b], gradient of y)"""
    B, T, H = shape
    torch.manual_seed(0)
    r, k, v, direction, gy = (torch.randn(B, T, H, HEAD_SIZE, device=device) for _ in range(5))
    w = torch.empty(B, T, H, HEAD_SIZE, device=device).uniform_(-6, 2)
    direction = torch.nn.functional.normalize(direction, dim=-1)
    inputs = (r, w, k, v, -direction, direction * torch.rand_like(direction))
    return [x.to(dtype).requires_grad_() for x in inputs], gy.to(dtype)


def forward(function, inputs, gy):
    function(*inputs)


def both(function, inputs, gy):
    for x in inputs:
        x.grad = None
    function(*inputs).backward(gy)


def seconds(device, run, *arguments):
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run(*arguments)
    synchronize()
    return time.perf_counter() - start


def peak_memory(name, shape, dtype, device):
    """Bytes that forward and backward need at their peak beyond the inputs, on the CPU in a fresh process."""
    if device == "cuda":
        return _peak_memory(name, shape, dtype, device)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (name, shape, dtype, device))


def _peak_memory(name, shape, dtype, device):
    function = contenders(device)[name]
    both(function, *random_inputs((1, 64, 1), dtype, device))
    inputs, gy = random_inputs(shape, dtype, device)
    return memory_of(lambda: both(function, inputs, gy), device)


def table(shape, dtype, device, rounds):
    B, T, H = shape
    functions = contenders(device)
    names = [name for name in functions if name not in SLOW or B * T * H <= MOST_STEPS]
    inputs, gy = random_inputs(shape, dtype, device)
    times = {(name, run): [] for name in names for run in (forward, both)}
    for number in range(rounds + 1):
        for name, run in times:
            if name in SLOW and number != 1:
                continue
            elapsed = seconds(device, run, functions[name], inputs, gy)
            if number:  # the first round warms up
                times[name, run].append(elapsed)
    size = B * T * H * HEAD_SIZE * torch.finfo(dtype).bits // 8
    print(f"\nB = {B}, T = {T}, H = {H}, {dtype}: y and the gradients alone {7 * size / 1e6:.0f} MB\n")
    print("| | forward, ms | ratio | forward + backward, ms | ratio | tokens/s | peak, MB |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        cells = []
        for run in (forward, both):
            own, ours = times[name, run], times[names[0], run]
            cells.append(f"{statistics.median(own) * 1e3:.1f}")
            cells.append(f"{statistics.median(x / y for x, y in zip(own, ours)):.1f}")
        tokens = B * T / statistics.median(times[name, both])
        memory = peak_memory(name, shape, dtype, device) / 1e6
        print(f"| {name} | {' | '.join(cells)} | {tokens:.0f} | {memory:.0f} |", flush=True)


def kernel_table(peak, calls):
    """The CPU kernel by itself, on one core: the fastest of `calls` calls, in the thread's own time."""
    print(
        f"\n| the kernel alone, one core of {peak / 1e9:.0f} GFLOP/s | T | H | forward, ns | of the peak | backward, "
        "ns | of the peak |"
    )
    print("|---|---|---|---|---|---|---|")
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for T, H in ((512, 1), (1024, 4), (1024, 32)):
            inputs, gy = random_inputs((1, T, H), dtype, "cpu")
            inputs = [x.detach() for x in inputs]
            checkpoints = kernel.forward(*inputs, None, None, save=True)[2]
            runs = (
                functools.partial(kernel.forward, *inputs, None, None, save=True),
                functools.partial(kernel.backward, *inputs, None, None, checkpoints, gy, None),
            )
            cells = []
            for run, nominal in zip(runs, (NOMINAL_FORWARD, NOMINAL_BACKWARD)):
                elapsed = []
                for _ in range(max(9, calls * 256 // (T * H))):
                    start = time.thread_time()
                    run()
                    elapsed.append(time.thread_time() - start)
                each = min(elapsed) / (T * H)
                cells.append(f"{each * 1e9:.0f} | {nominal * HEAD_SIZE**2 / each / peak:.0%}")
            print(f"| {dtype} | {T} | {H} | {' | '.join(cells)} |", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shape", action="append", help="B,T,H; may be given several times")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: {backends()['cuda'] or 'torch finds no GPU'}")
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as train.py does: else fresh pages cost more than the kernel
    card = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    print(f"torch {torch.__version__}, {options.device}, {card}; backends {backends()}")
    for shape in options.shape or SHAPES[options.device]:
        table(tuple(map(int, shape.split(","))), getattr(torch, options.dtype), options.device, options.rounds)
    if options.device == "cpu" and backends()["cpu"] is None:
        kernel_table(fma_peak(), 400)
    return 0


if __name__ == "__main__":
    sys.exit(main())
