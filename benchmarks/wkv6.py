"""wkv6's speed and memory: our backends, plain torch step by step and in chunks, and flash-linear-attention if
installed; on a GPU with nvcc also RWKV-LM's algorithm, a token at a time (wkv6_sequential.cu).

    python benchmarks/wkv6.py [--device cpu|cuda] [--dtype float32|bfloat16] [--shape B,T,H ...] [--repeats 5]

Forward, and forward and backward through autograd, N = 64. Each row gives milliseconds, the ratio to our kernel's time,
and the peak of memory beyond the inputs, beside that of outputs and gradients. On the CPU each measurement is a process
of its own, so that one's memory does not hide another's, and keeps freed pages for the next repetition, as training
does. A last table has the CPU kernel on one core, without torch around it: nanoseconds for each token and head, and the
part of the core's multiply-add peak, counting 5 operations for each state element and step forward and 12 backward.
"""

import argparse
import ctypes
import functools
import json
import multiprocessing
import resource
import statistics
import sys
import threading
import time
from pathlib import Path

import torch

from rwkv_peft.memory import keep_freed_memory
from rwkv_peft.ops.native import gpu, levels
from rwkv_peft.ops.native.arguments import fill
from rwkv_peft.ops.native.build import build_library
from rwkv_peft.ops.native.cpu import cpu_library
from rwkv_peft.ops.native.errors import BuildError
from rwkv_peft.ops.recurrence.cuda import CudaRecurrence
from rwkv_peft.ops.wkv6 import backends, wkv6
from rwkv_peft.ops.wkv6.cpu import RECURRENCE as kernel
from rwkv_peft.ops.wkv6.signature import SIGNATURE

HEAD_SIZE = 64
SHAPES = {  # B,T,H
    "cpu": ("1,1024,4", "1,1024,16", "1,1024,32", "1,16384,4", "1,65536,4"),
    "cuda": ("1,1024,32", "1,16384,32", "8,4096,32"),  # the last fills a GPU: 256 heads
}
NOMINAL_FORWARD, NOMINAL_BACKWARD = 5, 12
SLOW = ("torch, step by step",)  # measured once, up to SLOW_STEPS of batch x time x heads
SLOW_STEPS = 1 << 15


def torch_steps(r, k, v, w, u):
    """The simplest form of the recurrence: a Python loop over time."""
    return wkv6(r, k, v, w, u, backend="reference")[0]


def torch_chunks(r, k, v, w, u, chunk=64, part=16):
    """The recurrence as matrix products, the best form in plain torch: chunks of 64 steps, parts of 16 within them.

    With G the decays' logarithms summed from the chunk's start, step i reads what j < i wrote scaled by
    exp(G_{i-1} - G_j) per key. Between two parts both factors are taken relative to the start of the later part, so
    that no exponent is positive; within a part they are taken relative to its middle, and a decay is capped at exp(-10)
    a step, so that exponents stay within 80.
    """
    B, T, H, N = r.shape
    log_decay = -torch.exp(w.float()).clamp(max=10.0)
    padding = (0, 0, 0, 0, 0, -T % chunk)
    r, k, v, log_decay = (
        torch.nn.functional.pad(x.float(), padding).transpose(1, 2).unflatten(2, (-1, part))
        for x in (r, k, v, log_decay)
    )  # (B, H, parts, part, N)
    per = chunk // part
    group = lambda x: x.unflatten(2, (-1, per))  # noqa: E731  (B, H, chunks, per, part, N)
    whole = lambda x: x.flatten(3, 4)  # noqa: E731  (B, H, chunks, chunk, N)
    r, k, v, log_decay = map(group, (r, k, v, log_decay))
    G = whole(log_decay).cumsum(-2).unflatten(3, (per, part))
    before = G - log_decay
    total = whole(G)[..., -1:, :]

    middle = G[..., part // 2 - 1 : part // 2, :]
    within = ((r * (before - middle).exp()) @ (k * (middle - G).exp()).mT).tril(-1)
    within = within + torch.diag_embed((r * u.float()[:, None, None, None] * k).sum(-1))
    y = within @ v  # (B, H, chunks, per, part, N)
    parts = [y[..., 0, :, :]]
    for i in range(1, per):
        start = G[..., i - 1, -1:, :]
        earlier = whole(k[..., :i, :, :] * (start[..., None, :, :] - G[..., :i, :, :]).exp())
        scores = (r[..., i, :, :] * (before[..., i, :, :] - start).exp()) @ earlier.mT
        parts.append(y[..., i, :, :] + scores @ whole(v[..., :i, :, :]))
    y = torch.cat(parts, dim=-2)  # (B, H, chunks, chunk, N)

    written = (whole(k) * (total - whole(G)).exp()).mT @ whole(v)  # (B, H, chunks, N, N)
    decay = total.exp().mT
    state, states = torch.zeros_like(written[:, :, 0]), []
    for c in range(written.shape[2]):
        states.append(state)
        state = torch.addcmul(written[:, :, c], decay[:, :, c], state)
    y = y + (whole(r) * whole(before).exp()) @ torch.stack(states, dim=2)
    return y.flatten(2, 3)[:, :, :T].transpose(1, 2).to(u.dtype)


def sequential_plan(direction, head_size, dtype):
    """wkv6_sequential.cu's kernels of a direction, whose blocks have a thread a channel."""
    scalar = "bfloat16" if dtype == torch.bfloat16 else "float32"
    passes = ("forward",) if direction == "forward" else ("rows", "columns")
    return [(f"sequential_{name}_{scalar}", None) for name in passes]


SEQUENTIAL_KERNELS = tuple(
    name
    for direction in ("forward", "backward")
    for dtype in (torch.float32, torch.bfloat16)
    for name, _ in sequential_plan(direction, HEAD_SIZE, dtype)
)
SEQUENTIAL = CudaRecurrence(SIGNATURE, 1, SEQUENTIAL_KERNELS, sequential_plan)


class Sequential(torch.autograd.Function):
    """wkv6_sequential.cu: kernels (built), r k v w (B, T, H, 64), u (H, 64) -> y."""

    @staticmethod
    def forward(ctx, kernels, r, k, v, w, u):
        ctx.kernels = kernels
        ctx.save_for_backward(r, k, v, w, u)
        return SEQUENTIAL.run_forward(kernels, r, k, v, w, u.float(), None, None, save=False)[0]

    @staticmethod
    def backward(ctx, gy):
        r, k, v, w, u = ctx.saved_tensors
        scratch = torch.empty_like(r, dtype=torch.float32)
        inputs = (r, k, v, w, u.float(), None, None, scratch, gy.contiguous(), None)
        *gradients, gu, _ = SEQUENTIAL.run_backward(ctx.kernels, *inputs)
        return None, *gradients, gu.to(u.dtype)


@functools.cache
def sequential_kernels():
    """wkv6_sequential.cu built for the current GPU; None without nvcc."""
    try:
        nvcc, architecture = gpu.nvcc_for(torch.cuda.current_device())
    except BuildError:
        return None
    source = Path(__file__).resolve().with_name("wkv6_sequential.cu")
    recipe = gpu.recipe(source, nvcc, architecture)
    return SEQUENTIAL.family.library(build_library("wkv6_sequential", *recipe))


def contenders(device):
    """name -> function(r, k, v, w, u) -> y."""
    found = {}
    if backends()[device] is None:
        found[f"ours, {device}"] = lambda *x: wkv6(*x, backend=device)[0]
    if device == "cuda" and (kernels := sequential_kernels()):
        found["RWKV-LM's algorithm"] = functools.partial(Sequential.apply, kernels)
    found["torch, chunks"] = torch_chunks
    found["torch, step by step"] = torch_steps
    try:
        from fla.ops import rwkv6 as fla
    except ImportError:
        return found
    if device == "cuda":
        found["fla, chunk"] = lambda r, k, v, w, u: fla.chunk_rwkv6(r, k, v, -torch.exp(w), u, scale=1.0)[0]
    return found


def random_inputs(shape, device, dtype):
    B, T, H = shape
    torch.manual_seed(0)
    r, k, v, gy = (0.5 * torch.randn(B, T, H, HEAD_SIZE, device=device) for _ in range(4))
    w = torch.empty(B, T, H, HEAD_SIZE, device=device).uniform_(-6, 1)
    u = 0.5 * torch.randn(H, HEAD_SIZE, device=device)
    return [x.to(dtype).requires_grad_() for x in (r, k, v, w, u)], gy.to(dtype)


def measure(name, shape, device, dtype, repeats):
    """{forward, both: seconds, peak: bytes} of one contender, in this process."""
    function = contenders(device)[name]
    inputs, gy = random_inputs(shape, device, dtype)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    repeats = 1 if name in SLOW else repeats

    def forward():
        return function(*inputs)

    def both():
        for x in inputs:
            x.grad = None
        forward().backward(gy)

    small, small_gy = random_inputs((1, 64, 1), device, dtype)
    function(*small).backward(small_gy)  # builds what is to be built
    peak = memory_of(both, device)
    keep_freed_memory()  # as train.py does: else fresh pages cost more than the kernel
    times = {}
    for kind, run in (("forward", forward), ("both", both)):
        if name not in SLOW:
            run()
        elapsed = []
        for _ in range(repeats):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            elapsed.append(time.perf_counter() - start)
        times[kind] = statistics.median(elapsed)
    return {**times, "peak": peak}


def memory_of(run, device):
    """Bytes that `run` needs at its peak beyond what is in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = resident()
    peak, done = before, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return max(peak, resident()) - before


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def in_own_process(*arguments):
    """measure(*arguments) in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def fma_peak():
    """float32 operations a second of one core, at the CPU kernel's best instruction set."""
    source = Path(__file__).resolve().with_name("fma_peak.cpp")
    functions = (("fma_peak", ctypes.c_double, ctypes.c_double),)
    return cpu_library("fma_peak", source, levels.level_flags()[levels.best_level()], functions).fma_peak(1.0)


def kernel_table(peak, calls):
    """The CPU kernel by itself, on one core: medians over `calls` calls, or fewer if a call is long."""
    print(
        f"\n| the kernel alone, one core of {peak / 1e9:.0f} GFLOP/s | T | H | forward, ns | of the peak | backward, "
        "ns | of the peak |"
    )
    print("|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for T, H in ((512, 1), (1024, 4), (1024, 32)):
            steps, tensors = kernel_calls(T, H, dtype)
            times = []
            for step, nominal in zip(steps, (NOMINAL_FORWARD, NOMINAL_BACKWARD)):
                elapsed = []
                for _ in range(max(9, calls * 256 // (T * H))):
                    start = time.perf_counter()
                    step()
                    elapsed.append(time.perf_counter() - start)
                seconds = statistics.median(elapsed) / (T * H)
                times.append(f"{seconds * 1e9:.0f} | {nominal * HEAD_SIZE**2 / seconds / peak:.0%}")
            print(f"| {dtype} | {T} | {H} | {' | '.join(times)} |", flush=True)
            del tensors  # which the functions only point to


def kernel_calls(T, H, dtype):
    """(functions that run the CPU kernel's forward and backward in one thread, the tensors that they read and write)"""
    (r, k, v, w, u), gy = random_inputs((1, T, H), "cpu", dtype)
    u = u.detach().float()
    y, *gradients = (torch.zeros_like(r) for _ in range(5))
    final, gstate = torch.zeros(2, H, HEAD_SIZE, HEAD_SIZE)
    checkpoints, gu = torch.zeros(kernel.checkpoint_count(r, 1), H, HEAD_SIZE, HEAD_SIZE), torch.zeros_like(u)
    library = kernel.family.library()
    gr, gk, gv, gw = gradients
    tensors = dict(r=r, k=k, v=v, w=w, u=u, checkpoints=checkpoints, y=y, final_state=final)
    tensors |= dict(gy=gy, gr=gr, gk=gk, gv=gv, gw=gw, gu=gu, gstate=gstate)
    sizes = dict(sequences=1, tokens=T, heads=H, head_size=HEAD_SIZE)
    arguments = fill(kernel.Arguments, r, tensors, **sizes)
    arguments.threads = 1
    steps = [functools.partial(call, arguments) for call in (library.wkv6_cpu_forward, library.wkv6_cpu_backward)]
    steps[0](), steps[1]()
    return steps, tensors


def table(shape, device, dtype, repeats):
    B, T, H = shape
    size = B * T * H * HEAD_SIZE * torch.finfo(dtype).bits // 8
    least = 5 * size  # y and the gradients of r, k, v, w
    print(f"\nB = {B}, T = {T}, H = {H}, {dtype}: y and the gradients alone {least / 1e6:.0f} MB, ", end="")
    print(f"with a state each 64 steps {(least + 256 * B * T * H) / 1e6:.0f} MB\n")
    print("| | forward, ms | ratio | forward + backward, ms | ratio | tokens/s | peak, MB |")
    print("|---|---|---|---|---|---|---|")
    ours = None
    for name in contenders(device):
        if name in SLOW and B * T * H > SLOW_STEPS:
            continue
        run = in_own_process if device == "cpu" else measure
        found = run(name, shape, device, dtype, repeats)
        ours = ours or found
        print(f"| {name} | {found['forward'] * 1e3:.2f} | {found['forward'] / ours['forward']:.1f} ", end="")
        print(f"| {found['both'] * 1e3:.2f} | {found['both'] / ours['both']:.1f} ", end="")
        print(f"| {B * T / found['both']:.0f} | {found['peak'] / 1e6:.0f} |", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shape", action="append", help="B,T,H; may be given several times")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: {backends()['cuda'] or 'torch finds no GPU'}")
    reason = backends()[options.device]
    if reason is not None:
        print(f"no kernel for {options.device}: {reason}")
    card = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {options.device}, {card}; backends {json.dumps(backends())}")
    for shape in options.shape or SHAPES[options.device]:
        table(tuple(map(int, shape.split(","))), options.device, getattr(torch, options.dtype), options.repeats)
    if options.device == "cpu" and reason is None:
        kernel_table(fma_peak(), 400)
    return 0


if __name__ == "__main__":
    sys.exit(main())
