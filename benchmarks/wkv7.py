"""wkv7's speed and memory on the CPU: our kernel, the chunked form in plain torch, and plain torch step by step.

    python benchmarks/wkv7.py [--dtype float32|bfloat16] [--shape B,T,H ...] [--rounds 5] [--threads N]

Forward, and forward and backward through autograd, N = 64. Each round runs every backend once, one after another, so
that what else the machine does slows all of them alike; times are medians over rounds, ratios the medians of a round's
ratios to the kernel. Memory is the most that was in use beyond the inputs, measured in a process of its own. A last
table has the CPU kernel alone on one core, without torch around it, in the core's own time: nanoseconds a token and
head, and the part of the core's multiply-add peak, counting 9 operations a state element and step forward and 19
backward, as many as the recurrence takes step by step.
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
from rwkv_peft.ops.wkv7 import backends, cpu, wkv7

HEAD_SIZE = 64
SHAPES = ("1,1024,4", "1,1024,32", "1,16384,4")
NOMINAL_FORWARD, NOMINAL_BACKWARD = 9, 19
STEPS = "reference"
MOST_STEPS = 1 << 15  # of batch x time x heads that the reference is given; one round


def random_inputs(shape, dtype):
    """([r, w, k, v, a, b], gradient of y)"""
    B, T, H = shape
    torch.manual_seed(0)
    r, k, v, direction, gy = (torch.randn(B, T, H, HEAD_SIZE) for _ in range(5))
    w = torch.empty(B, T, H, HEAD_SIZE).uniform_(-6, 2)
    direction = torch.nn.functional.normalize(direction, dim=-1)
    inputs = (r, w, k, v, -direction, direction * torch.rand_like(direction))
    return [x.to(dtype).requires_grad_() for x in inputs], gy.to(dtype)


def forward(backend, inputs, gy):
    wkv7(*inputs, backend=backend)


def both(backend, inputs, gy):
    for x in inputs:
        x.grad = None
    wkv7(*inputs, backend=backend)[0].backward(gy)


def seconds(run, *arguments):
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def peak_memory(backend, shape, dtype):
    """Bytes that forward and backward need at their peak beyond the inputs, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (backend, shape, dtype))


def _peak_memory(backend, shape, dtype):
    both(backend, *random_inputs((1, 64, 1), dtype))
    inputs, gy = random_inputs(shape, dtype)
    return memory_of(lambda: both(backend, inputs, gy), "cpu")


def table(shape, dtype, rounds):
    B, T, H = shape
    names = [name for name, reason in backends().items() if reason is None]
    names.sort(reverse=True, key=("reference", "chunked", "cpu").index)
    if B * T * H > MOST_STEPS:
        names.remove(STEPS)
    inputs, gy = random_inputs(shape, dtype)
    times = {(name, run): [] for name in names for run in (forward, both)}
    for number in range(rounds + 1):
        for name, run in times:
            if name == STEPS and number != 1:
                continue
            elapsed = seconds(run, name, inputs, gy)
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
        memory = peak_memory(name, shape, dtype) / 1e6
        print(f"| {name} | {' | '.join(cells)} | {tokens:.0f} | {memory:.0f} |", flush=True)


def kernel_table(peak, calls):
    """The CPU kernel alone, on one core: the fastest of `calls` calls, in the thread's own time."""
    print(
        f"\n| the kernel alone, one core of {peak / 1e9:.0f} GFLOP/s | T | H | forward, ns | of the peak | backward, "
        "ns | of the peak |"
    )
    print("|---|---|---|---|---|---|---|")
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for T, H in ((512, 1), (1024, 4), (1024, 32)):
            inputs, gy = random_inputs((1, T, H), dtype)
            inputs = [x.detach() for x in inputs]
            checkpoints = cpu.forward(*inputs, None, None, True, "")[2]
            runs = (
                functools.partial(cpu.forward, *inputs, None, None, True, ""),
                functools.partial(cpu.backward, *inputs, None, None, checkpoints, gy, None, ""),
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
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shape", action="append", help="B,T,H; may be given several times")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as train.py does: else fresh pages cost more than the kernel
    print(f"torch {torch.__version__}, {options.threads} threads; backends {backends()}")
    for shape in options.shape or SHAPES:
        table(tuple(map(int, shape.split(","))), getattr(torch, options.dtype), options.rounds)
    if backends()["cpu"] is None:
        kernel_table(fma_peak(), 400)
    return 0


if __name__ == "__main__":
    sys.exit(main())
