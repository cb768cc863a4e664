"""The recurrences' speed and memory: our kernel, the chunked form in plain torch, plain torch step by step, and on a
GPU flash-linear-attention if it is installed.

    python benchmarks/recurrences.py wkv6|wkv7 [--device cpu|cuda] [--dtype float32|bfloat16] [--shape B,T,H ...]
                                     [--rounds 5] [--threads N]

Forward, and forward and backward through autograd, N = 64. Each round runs every contender once, one after another, so
that other work on the machine slows all of them alike; times are medians over rounds, ratios the medians of a round's
ratios to the kernel. Memory is the peak beyond the inputs, on the CPU in a process of its own. There, a last table has
the CPU kernel on one core, without torch around it, in the core's own time: nanoseconds for each token and head, and
the part of the core's multiply-add peak, counting 5 operations for each state element and step of wkv6 forward and 12
backward, 9 and 19 of wkv7's, as many as the recurrence takes step by step.
"""

import argparse
import ctypes
import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Parser, head, resident_peak, row
from common import run as run_script

from rwkv_peft.memory import keep_freed_memory
from rwkv_peft.ops import wkv6, wkv7
from rwkv_peft.ops.native import cpu
from rwkv_peft.ops.native.cpu import cpu_library
from rwkv_peft.ops.recurrence.kernels import CpuRecurrence
from rwkv_peft.ops.recurrence.signature import Signature
from rwkv_peft.ops.wkv7.reference import DECAY_SCALE

HEAD_SIZE = 64
SHAPES = {  # B,T,H
    "cpu": ("1,1024,4", "1,1024,32", "1,16384,4"),
    "cuda": ("1,1024,32", "1,4096,64", "8,4096,32"),  # the last fills a GPU: 256 heads
}
SLOW = "torch, step by step"  # measured once, up to MOST_STEPS of batch x time x heads
MOST_STEPS = 1 << 15


@dataclass(frozen=True)
class Subject:
    """A recurrence, what its backends say, its inputs and CPU kernel, the bounds of its w, and the nominal operations
    for each state element and step, forward and backward."""

    call: Callable
    backends: Callable
    signature: Signature
    kernel: CpuRecurrence
    decays: tuple[float, float]
    nominal: tuple[int, int]


SUBJECTS = {
    "wkv6": Subject(wkv6.wkv6, wkv6.backends, wkv6.SIGNATURE, wkv6.WKV6.cpu, (-6, 1), (5, 12)),
    "wkv7": Subject(wkv7.wkv7, wkv7.backends, wkv7.SIGNATURE, wkv7.WKV7.cpu, (-6, 2), (9, 19)),
}


def contenders(name, device):
    """title -> function(inputs) -> y, our kernel first if it works."""
    subject, titles = SUBJECTS[name], {device: f"ours, {device}", "chunked": "torch, chunks", "reference": SLOW}
    found = {
        title: lambda *inputs, backend=backend: subject.call(*inputs, backend=backend)[0]
        for backend, title in titles.items()
        if subject.backends()[backend] is None
    }
    try:
        from fla.ops.rwkv6 import chunk_rwkv6
        from fla.ops.rwkv7 import chunk_rwkv7
    except ImportError:
        return found
    theirs = {
        "wkv6": lambda r, k, v, w, u: chunk_rwkv6(r, k, v, -torch.exp(w), u, scale=1.0)[0],
        "wkv7": lambda r, w, *others: chunk_rwkv7(r, DECAY_SCALE * torch.sigmoid(w), *others)[0],
    }
    return found | ({"fla, chunk": theirs[name]} if device == "cuda" else {})


def random_inputs(name, shape, dtype, device):
    """([the recurrence's inputs], gradient of y), with a and b a direction to remove, and the same times a rate."""
    B, T, H = shape
    torch.manual_seed(0)
    signature = SUBJECTS[name].signature
    found = {key: torch.randn(B, T, H, HEAD_SIZE, device=device) for key in "rkv"}
    found["w"] = torch.empty(B, T, H, HEAD_SIZE, device=device).uniform_(*SUBJECTS[name].decays)
    direction = torch.nn.functional.normalize(torch.randn_like(found["r"]), dim=-1)
    found |= dict(a=-direction, b=direction * torch.rand_like(direction))
    inputs = [found[key] for key in signature.rows]
    inputs += [0.5 * torch.randn(H, HEAD_SIZE, device=device) for _ in signature.shared]
    return [x.to(dtype).requires_grad_() for x in inputs], torch.randn_like(direction).to(dtype)


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


def peak_memory(*arguments):
    """Bytes that forward and backward need at their peak beyond the inputs, on the CPU in a fresh process; arguments:
    those of _peak_memory."""
    title, name, shape, dtype, device = arguments
    if device == "cuda":
        return _peak_memory(*arguments)
    kind = ("--shape", ",".join(map(str, shape)), "--dtype", str(dtype).removeprefix("torch."))
    return float(run_script(Path(__file__).resolve(), name, "--device", device, *kind, "--peak_of", title))


def _peak_memory(title, name, shape, dtype, device):
    function = contenders(name, device)[title]
    both(function, *random_inputs(name, (1, 64, 1), dtype, device))
    inputs, gy = random_inputs(name, shape, dtype, device)
    return memory_of(lambda: both(function, inputs, gy), device)


def memory_of(run, device):
    """Bytes that `run` needs at its peak beyond what is in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = resident_peak()
    run()
    return resident_peak() - before


def table(name, shape, dtype, device, rounds):
    B, T, H = shape
    functions = contenders(name, device)
    titles = [title for title in functions if title != SLOW or B * T * H <= MOST_STEPS]
    inputs, gy = random_inputs(name, shape, dtype, device)
    times = {(title, run): [] for title in titles for run in (forward, both)}
    for number in range(rounds + 1):
        for title, run in times:
            if title == SLOW and number != 1:
                continue
            elapsed = seconds(device, run, functions[title], inputs, gy)
            if number:  # the first round warms up
                times[title, run].append(elapsed)
    alone = (1 + len(SUBJECTS[name].signature.rows)) * gy.numel() * gy.element_size()
    print(f"\nB = {B}, T = {T}, H = {H}, {dtype}: y and the gradients alone {alone / 1e6:.0f} MB\n")
    head("", "forward, ms", "ratio", "forward + backward, ms", "ratio", "tokens/s", "peak, MB")
    for title in titles:
        cells = []
        for run in (forward, both):
            own, ours = times[title, run], times[titles[0], run]
            cells.append(f"{statistics.median(own) * 1e3:.2f}")
            cells.append(f"{statistics.median(x / y for x, y in zip(own, ours)):.1f}")
        tokens = B * T / statistics.median(times[title, both])
        memory = peak_memory(title, name, shape, dtype, device) / 1e6
        row(title, *cells, f"{tokens:.0f}", f"{memory:.0f}")


def fma_peak():
    """float32 operations a second of one core, at the CPU kernel's best instruction set."""
    source = Path(__file__).resolve().with_name("fma_peak.cpp")
    functions = (("fma_peak", ctypes.c_double, ctypes.c_double),)
    return cpu_library("fma_peak", source, cpu.level_flags()[cpu.best_level()], functions).fma_peak(1.0)


def kernel_table(name, peak, calls):
    """The CPU kernel by itself, on one core: the fastest of `calls` calls, in the thread's own time."""
    print()
    title = f"the kernel alone, one core of {peak / 1e9:.0f} GFLOP/s"
    head(title, "T", "H", "forward, ns", "of the peak", "backward, ns", "of the peak")
    torch.set_num_threads(1)
    kernel, rows = SUBJECTS[name].kernel, len(SUBJECTS[name].signature.rows)
    for dtype in (torch.float32, torch.bfloat16):
        for T, H in ((512, 1), (1024, 4), (1024, 32)):
            inputs, gy = random_inputs(name, (1, T, H), dtype, "cpu")
            inputs = [x.detach() if i < rows else x.detach().float() for i, x in enumerate(inputs)]
            checkpoints = kernel.forward(*inputs, None, None, save=True)[2]
            runs = (
                functools.partial(kernel.forward, *inputs, None, None, save=True),
                functools.partial(kernel.backward, *inputs, None, None, checkpoints, gy, None),
            )
            cells = []
            for run, nominal in zip(runs, SUBJECTS[name].nominal):
                elapsed = []
                for _ in range(max(min(9, calls), calls * 256 // (T * H))):
                    start = time.thread_time()
                    run()
                    elapsed.append(time.thread_time() - start)
                each = min(elapsed) / (T * H)
                cells += [f"{each * 1e9:.0f}", f"{nominal * HEAD_SIZE**2 / each / peak:.0%}"]
            row(dtype, T, H, *cells)


def main(argv=None):
    parser = Parser(__doc__, recurrence="wkv7", device="cpu", shape=("1,64,2",), rounds=1, calls=1, threads=1)
    parser.add_argument("recurrence", choices=SUBJECTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shape", action="append", help="B,T,H; may be given several times")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=400, help="of the kernel alone, if it is small")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak_of", metavar="TITLE", help=argparse.SUPPRESS)  # set where this program runs itself
    options = parser.parse_args(argv)
    name, backends = options.recurrence, SUBJECTS[options.recurrence].backends()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: {backends['cuda'] or 'torch finds no GPU'}")
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as train.py does: else fresh pages cost more than the kernel
    dtype = getattr(torch, options.dtype)
    shapes = [tuple(map(int, shape.split(","))) for shape in options.shape or SHAPES[options.device]]
    if options.peak_of:
        print(_peak_memory(options.peak_of, name, shapes[0], dtype, options.device))
        return 0
    card = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    print(f"torch {torch.__version__}, {options.device}, {card}; backends {backends}")
    for shape in shapes:
        table(name, shape, dtype, options.device, options.rounds)
    if options.device == "cpu" and backends["cpu"] is None:
        kernel_table(name, fma_peak(), options.calls)
    return 0


if __name__ == "__main__":
    sys.exit(main())
