"""Describes a GPU, and builds, checks and times our kernels on it: one JSON object in each line.

    python benchmarks/gpu_kernels.py card     name, driver, clocks, copy bandwidth, the rate of an 8192 x 8192 product
    python benchmarks/gpu_kernels.py build    the kernels as training builds them, all at once: seconds, or why not
    python benchmarks/gpu_kernels.py check    every operation and its gradients against float64, 20 equal repetitions
    python benchmarks/gpu_kernels.py above    tensors of more than 2^31 elements, at which an index of 32 bits wraps
    python benchmarks/gpu_kernels.py time     microseconds, GB/s, share of the traffic's floor
    python benchmarks/gpu_kernels.py draw     a draw with top-p by sorting, by selection, and by a CUDA graph of each

"check" prints relative errors of results and gradients, ours and plain torch's; one may be twice as large as plain
torch's. "above" compares the last of many rows with a batch that is this row alone: rows do not depend on each other,
so that the bits are the same unless the kernels split time for few rows. "draw" must draw the same tokens in every way.
scripts/gpu_check.sh runs them. Exit code 1 if
something is wrong, 2 without a usable GPU.
"""

import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from common import NO_GPU, Parser, peak_gib, reset_peak, tell, without_room

from rwkv_peft.adapters.functions.bat_in import bat_in
from rwkv_peft.adapters.functions.bat_out import bat_out
from rwkv_peft.adapters.functions.bone import bone
from rwkv_peft.adapters.functions.lora import lora
from rwkv_peft.adapters.product import Frozen
from rwkv_peft.inference import sampling
from rwkv_peft.inference.forward import record_graph
from rwkv_peft.inference.settings import Sampling
from rwkv_peft.ops import cross_entropy, decode, mix
from rwkv_peft.ops.bone.cuda import FAMILY as BONE
from rwkv_peft.ops.cross_entropy import cross_entropy_
from rwkv_peft.ops.mix.cuda import FAMILY as MIX
from rwkv_peft.ops.native.cuda import CudaFamily, misfit
from rwkv_peft.ops.recurrence import Recurrence
from rwkv_peft.ops.wkv6 import WKV6, wkv6
from rwkv_peft.ops.wkv7 import WKV7, wkv7

FAMILIES = (WKV6.cuda.family, WKV7.cuda.family, MIX, BONE, cross_entropy.CUDA, decode.CUDA)
RECURRENCES = {"wkv6": (wkv6, WKV6.cuda), "wkv7": (wkv7, WKV7.cuda)}
N, T, C, H = 64, 300, 512, 8
VOCABULARY = 65536
BOUNDS = (0, 1, 64, 128, 300)  # of packed sequences
TIMED = ((8, 4096, 32), (1, 4096, 64), (1, 1024, 32), (8, 1024, 8))  # B, T, H of head size 64
LEAST = {torch.float32: 1e-5, torch.bfloat16: 4e-3}  # errors that a dtype may have in any case
TOP_P = 0.7
CLOSE = 2e-2  # of bfloat16, if a sum has another order


@contextmanager
def plain_torch():
    """A context in which GPUs' kernels take no tensor."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(CudaFamily, "takes", lambda *_: False))
        stack.enter_context(patch.object(Recurrence, "_resolve", lambda self, *_: "reference"))
        yield


def poison(device):
    """Leave NaN in the memory that the allocator gives out next."""
    blocks = [torch.full((2**size,), float("nan"), device=device) for size in range(8, 24)]
    del blocks


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


# --- card and build


def card(args):
    """Describe the card."""
    if args.device == "cpu":
        return tell(torch=torch.__version__, device="cpu")
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True)
        tell(nvidia_smi=dict(zip(query.split(","), done.stdout.decode().strip().split(", "))))
    except OSError as error:
        tell(nvidia_smi=str(error))
    properties = torch.cuda.get_device_properties(0)
    tell(
        name=properties.name,
        gpus=torch.cuda.device_count(),
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


def build(args):
    """Build all families' kernels, each in a thread of its own, because most of it is compilers' work."""

    def one(family):
        start = time.perf_counter()
        reason = family.unavailable()
        tell(kernels=family.op, usable=reason is None, reason=reason, seconds=round(time.perf_counter() - start, 1))
        return int(reason is not None and args.device == "cuda")

    with ThreadPoolExecutor(len(FAMILIES)) as pool:
        return max(pool.map(one, FAMILIES))


# --- every operation against float64


@dataclass(frozen=True)
class Op:
    """An operation of random inputs (B, T, …), and of parameters, which come behind them and are small.

    wanted: the numbers of the inputs that have gradients (None: all); exact: those that stay in float32."""

    function: Callable
    shapes: tuple
    wanted: tuple | None = None
    exact: tuple = ()
    inputs: Callable | None = None  # in place of random ones: inputs(device)

    def made(self, device):
        """The inputs in float32."""
        if self.inputs is not None:
            return self.inputs(device)
        generator = torch.Generator().manual_seed(0)
        scales = [1.0 if shape[:2] in ((2, T), (T, VOCABULARY)) else 0.2 for shape in self.shapes]
        return [(s * torch.randn(shape, generator=generator)).to(device) for s, shape in zip(scales, self.shapes)]

    def results(self, inputs, dtype):
        """The outputs, and the gradients of the wanted inputs, in float64."""
        wanted = range(len(inputs)) if self.wanted is None else self.wanted
        leaves = [
            x.to(torch.float32 if i in self.exact and dtype != torch.float64 else dtype, copy=True).requires_grad_(
                i in wanted
            )
            for i, x in enumerate(inputs)
        ]
        outs = self.function(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        if wanted:
            torch.autograd.backward(outs, [torch.cos(3 * out.detach()) for out in outs])
        return [x.detach().double().cpu() for x in (*outs, *(leaves[i].grad for i in wanted))]


def recurrence_inputs(name, B, T, H, N, device):
    """The inputs of a recurrence in float32; its a and b are a direction to remove, and the same times a rate."""
    signature = RECURRENCES[name][1].signature
    generator = torch.Generator(device=device).manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    made = {row: 0.5 * random(B, T, H, N) for row in "rkv"}
    made["w"] = -6 + 7 * torch.rand(B, T, H, N, generator=generator, device=device)
    direction = torch.nn.functional.normalize(random(B, T, H, N), dim=-1)
    made |= dict(a=-direction, b=0.5 * direction)
    return [*(made[row] for row in signature.rows), *(0.5 * random(H, N) for _ in signature.shared)]


def recurrence(name, size, bounds):
    """The Op of a recurrence with heads of `size`, over one sequence or packed ones."""
    call, kernels = RECURRENCES[name]
    rows, shared = len(kernels.signature.rows), len(kernels.signature.shared)

    def function(*leaves):
        packed = None if bounds is None else torch.tensor(bounds, device=leaves[0].device)
        return call(*leaves, cu_seqlens=packed)[0]

    inputs = partial(recurrence_inputs, name, 1, 280, 3, size)
    return Op(function, (), exact=tuple(range(rows, rows + shared)), inputs=inputs)


def packed_lerp(x, last, maa, low, up):
    """lerp over a row of several sequences."""
    return mix.lerp(x[:1], last, maa, low[:1], up, torch.tensor(BOUNDS, device=x.device))


def loss(logits):
    """The loss and its gradient, both as results."""
    targets = torch.arange(logits.shape[0], device=logits.device)
    return cross_entropy_(logits.detach().clone(), targets, 0.5, 0.01)


def blocks(x, weight, bits):
    """Products of a few rows and of many with blocks."""
    matrix = decode.quantize(weight.detach(), bits)
    return tuple(decode.product(x.detach().flatten(0, 1)[:rows], matrix) for rows in (1, 5, 16, 600))


def on_frozen(function, *rest):
    """An adapter's function of x, a weight and its parameters."""
    return lambda x, weight, *params: function(x, Frozen(weight), *params, *rest)


ROWS, HEADS, VECTOR, WEIGHT = (2, T, C), (2, T, H, N), (1, 1, C), (256, C)
LOW = ((2, T, 5 * 32), (5, 32, C))
PACKED = (ROWS, (len(BOUNDS) - 1, C), (5, C), *LOW)
OPS = {
    **{
        f"{name} of {size}{', packed' * (bounds is not None)}": recurrence(name, size, bounds)
        for name in RECURRENCES
        for size in (64, 128, 32)
        for bounds in (None, (0, 1, 18, 82, 147, 277, 280))
    },
    "lerp": Op(lambda x, maa: mix.lerp(x, None, maa), (ROWS, (6, C))),
    "lerp of low rank": Op(lambda *x: mix.lerp(x[0], None, *x[1:]), (ROWS, (5, C), *LOW), (0, 2)),
    "lerp of low rank, packed": Op(packed_lerp, PACKED, (0, 1, 3)),
    "lerp of low rank, trained": Op(packed_lerp, PACKED),
    "norm_gate": Op(lambda *x: mix.norm_gate(*x, 64e-5), (HEADS, ROWS, (C,), (C,))),
    "norm_bonus_gate": Op(
        lambda *x: mix.norm_bonus_gate(*x[:5], x[5:], 64e-5), (HEADS, HEADS, HEADS, HEADS, ROWS, (H, N), (C,), (C,))
    ),
    "delta_keys": Op(mix.delta_keys, (HEADS, HEADS, VECTOR, VECTOR, VECTOR)),
    "value_residual": Op(mix.value_residual, (ROWS, ROWS, ROWS, VECTOR)),
    "relu_square": Op(mix.relu_square, (ROWS,)),
    "sigmoid_gate": Op(mix.sigmoid_gate, (ROWS, ROWS)),
    **{
        f"bat-in of {rank}": Op(on_frozen(bat_in), (ROWS, WEIGHT, (C // rank, rank, rank)), (0, 2))
        for rank in (64, 128, 8)
    },
    "bat-out": Op(on_frozen(bat_out), (ROWS, WEIGHT, (4, 64, 64)), (0, 2)),
    "bone": Op(on_frozen(bone), (ROWS, WEIGHT, (64, 256)), (0, 2)),
    "lora": Op(on_frozen(lora), (ROWS, WEIGHT, (64, C), (256, 64)), (0, 2, 3)),
    **{f"blocks of {bits} bits": Op(partial(blocks, bits=bits), (ROWS, (300, C)), ()) for bits in (8, 4)},
    "loss": Op(loss, ((T, VOCABULARY),), ()),
}


def check(args):
    """Check the operations in both dtypes -> 1 if one is wrong."""
    wrong = 0
    for name in args.only or OPS:
        for dtype in LEAST:
            op = OPS[name]
            inputs = [x if i in op.exact else x.to(dtype) for i, x in enumerate(op.made(args.device))]
            with plain_torch():
                truth, plain = op.results(inputs, torch.float64), op.results(inputs, dtype)
            poison(args.device)
            ours = op.results(inputs, dtype)
            repeated = all(all(map(torch.equal, ours, op.results(inputs, dtype))) for _ in range(args.repeats - 1))
            errors = [[float((x - true).norm() / true.norm()) for x in both] for *both, true in zip(ours, plain, truth)]
            right = all(mine <= 2 * theirs + LEAST[dtype] for mine, theirs in errors)  # NaN is not
            kind = str(dtype).removeprefix("torch.")
            tell(operation=name, dtype=kind, right=right, repeated=repeated, errors_ours_and_torch=errors)
            wrong += not (right and repeated)
    return int(wrong > 0)


# --- above 2^31 elements


def last_among_and_alone(function, leaves, gradient, shared=0):
    """(the result and the first leaf's gradient in the last row among the others, the same of that row alone). All rows
    share the last `shared` leaves."""

    def results(leaves, gradient):
        leaves = [x.detach().requires_grad_(i == 0) for i, x in enumerate(leaves)]
        y = function(*leaves)
        y.backward(gradient)
        return y.detach()[-1:].clone(), leaves[0].grad[-1:].clone()

    own = len(leaves) - shared
    alone = [*(x[-1:].clone() for x in leaves[:own]), *leaves[own:]]
    return results(leaves, gradient), results(alone, gradient[-1:].clone())


def recurrence_above(name, rows, args):
    """A recurrence; r, k, v and the gradient share memory, because a card has room for only some twelve tensors."""
    signature = RECURRENCES[name][1].signature
    leaves = recurrence_inputs(name, 1, args.tokens, args.heads, N, args.device)
    many = {row: x.bfloat16().expand(rows, -1, -1, -1) for row, x in zip(signature.rows, leaves)}
    shared = many["v"].contiguous()
    tensors = [shared if row in "rkv" else x.contiguous() for row, x in many.items()]
    rest = leaves[len(tensors) :]
    return last_among_and_alone(lambda *x: RECURRENCES[name][0](*x)[0], [*tensors, *rest], shared, len(rest))


def elementwise_above(function, count, rows, args):
    """An operation on `count` tensors (rows, T, C)."""
    shape = 1, args.tokens, args.heads * N
    row = [torch.randn(shape, device=args.device, dtype=torch.bfloat16) for _ in range(count + 1)]
    *leaves, gradient = (x.expand(rows, -1, -1).contiguous() for x in row)
    return last_among_and_alone(function, leaves, gradient)


def loss_above(rows, args):
    """The losses and their gradient, of a vocabulary of 65,536."""
    count = max(2, rows * args.tokens * args.heads * N // VOCABULARY)
    row = torch.randn(1, VOCABULARY, device=args.device, dtype=torch.bfloat16)
    targets = torch.zeros(count, dtype=torch.int64, device=args.device)
    alone = cross_entropy_(row.clone(), targets[:1], 1.0, each=True)
    among = cross_entropy_(row.expand(count, -1).contiguous(), targets, 1.0, each=True)
    return [x[-1:] for x in among], alone


ABOVE = {
    **{name: partial(recurrence_above, name) for name in RECURRENCES},
    "relu_square": partial(elementwise_above, mix.relu_square, 1),
    "sigmoid_gate": partial(elementwise_above, mix.sigmoid_gate, 2),
    "loss": loss_above,
}


def above(args):
    """Check large tensors, in bfloat16 -> an exit code."""

    def one(name):
        reset_peak(args.device)
        row = args.tokens * args.heads * N
        rows = args.elements // row + 1
        among, alone = ABOVE[name](rows, args)
        errors = [float((x.double() - y.double()).norm() / y.double().norm()) for x, y in zip(among, alone)]
        right = all(error <= CLOSE for error in errors)  # which NaN is not
        tell(operation=name, elements=rows * row, right=right, errors=errors, **peak_gib(args.device))
        return int(not right)

    return max(without_room(partial(one, name), operation=name) for name in ABOVE)


# --- times


def time_kernels(args):
    """Time the recurrences' kernels and decoding's products, beside the time of their bytes at the copy's bandwidth."""
    if args.device == "cpu":
        return tell(skipped="kernels are timed on a GPU")
    bandwidth = copy_bandwidth()
    for (name, (_, kernels)), (B, T, H) in ((each, shape) for each in RECURRENCES.items() for shape in TIMED):
        rows = len(kernels.signature.rows)
        leaves = recurrence_inputs(name, B, T, H, N, args.device)
        tensors = [x.bfloat16() if i < rows else x for i, x in enumerate(leaves)]
        gradient = torch.ones_like(tensors[0])
        checkpoints = kernels.forward(*tensors, None, None, save=True)[2]
        states = checkpoints.numel() * 4
        forward = partial(kernels.forward, *tensors, None, None, save=True)
        backward = partial(kernels.backward, *tensors, None, None, checkpoints, gradient, None)
        time_one(f"{name} forward", (B, T, H), forward, (rows + 1) * gradient.nbytes + states, bandwidth)
        time_one(f"{name} backward", (B, T, H), backward, (2 * rows + 1) * gradient.nbytes + states, bandwidth)
    head = torch.randn(VOCABULARY, 2048, device="cuda", dtype=torch.bfloat16)  # larger than any cache
    for bits in decode.BITS:
        matrix = decode.quantize(head, bits)
        for n in (1, 4, 16):
            product = partial(decode.product, head[:n], matrix)
            time_one(f"blocks of {bits} bits, {n} rows", head.shape, product, matrix.nbytes, bandwidth)


def time_one(name, shape, function, traffic, bandwidth):
    ms = milliseconds(function)
    floor = traffic / 1e6 / bandwidth
    figures = dict(us=1e3 * ms, gb_s=traffic / 1e6 / ms, floor_us=1e3 * floor, of_floor=floor / ms)
    tell(kernel=name, shape=list(shape), **{key: float(f"{figure:.3g}") for key, figure in figures.items()})


# --- drawing


def draw(args):
    """Time draws with top-p, by each way and at each number of rows -> 1 if two ways draw other tokens."""
    torch.manual_seed(0)
    return int(any([draw_one(args, rows) for rows in args.rows]))


def draw_one(args, rows):
    """Print the times of one number of rows -> True if two ways draw other tokens."""
    cuda, nucleus = args.device == "cuda", Sampling(top_p=TOP_P)
    logits = 3 * torch.randn(rows, args.vocab, device=args.device)
    if cuda:
        logits = logits.bfloat16().float()  # with ties, which a CPU's partial sort leaves in any order
    uniforms = torch.rand(rows, dtype=torch.float64, device=args.device)
    numbers = sampling.fill_numbers(uniforms.new_empty(3), nucleus)

    def draw_sorted():
        weights, tokens = sampling.candidates(logits, nucleus)
        return tokens.gather(-1, sampling.pick(weights, uniforms))[:, 0]

    ways = {"sorted": draw_sorted, "selected": partial(sampling.select, logits, uniforms, numbers)}
    drawn = {name: way().tolist() for name, way in ways.items()}
    for name, way in [*ways.items()] if cuda else ():
        if recorded := record_graph(way, torch.cuda.graph_pool_handle(), f"how tokens are {name}"):
            graph, tokens = recorded
            graph.replay()
            drawn[f"{name}, recorded"], ways[f"{name}, recorded"] = tokens.tolist(), graph.replay
    for name, way in ways.items():
        ms = milliseconds(way) if cuda else 1e3 * timeit.timeit(way, number=1)
        tell(draw=name, rows=rows, top_p=TOP_P, us=round(1e3 * ms, 1), same=drawn[name] == drawn["sorted"])
    return any(tokens != drawn["sorted"] for tokens in drawn.values())


PARTS = {"card": card, "build": build, "check": check, "above": above, "time": time_kernels, "draw": draw}
QUICK = dict(part="card", device="cpu", repeats=1, only=("relu_square", "wkv7 of 32, packed"), vocab=3000)


def main(argv=None):
    parser = Parser(__doc__, **QUICK, elements=4000, tokens=20, heads=2)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--only", nargs="+", choices=OPS, help="of check, these operations")
    parser.add_argument("--repeats", type=int, default=20, help="of check")
    parser.add_argument("--elements", type=int, default=2**31, help="of above: a tensor has more than so many")
    parser.add_argument("--tokens", type=int, default=4096, help="of above: of a row")
    parser.add_argument("--heads", type=int, default=64, help="of above: of 64 channels")
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 64), help="of draw")
    parser.add_argument("--vocab", type=int, default=VOCABULARY, help="of draw: logits of a row")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(argv)
    reason = misfit() if args.device == "cuda" else None
    if reason is not None:
        tell(gpu=reason)
        return NO_GPU
    return PARTS[args.part](args) or 0


if __name__ == "__main__":
    sys.exit(main())
