"""Counts, without a GPU, a block's launches and bytes on a GPU's code path, outside its large matrix products, and
measures the time that they take on the processor that drives the GPU.

    python benchmarks/gpu_budget.py [--generations x060 x070] [--methods frozen bat-in …]
    python benchmarks/gpu_budget.py --host [--rounds 200]

A block runs forward and backward on meta tensors, in bfloat16; each of torch's operations that computes something is
one launch, and its bytes are those of its inputs (expanded ones at their real size) and outputs. A unit is one read or
write of (T, C). The products with the block's large matrices are left out: they are the floor, as benchmarks/step.py
calls it. "step / floor" follows for a whole block on an H100 (650 TFLOP/s, 2.8 TB/s for torch's operations), without
any waiting. A micro batch has twice as many tokens as channels, so that no activation has a matrix's shape.

"at 1 x 4096" adds for one row of 4096 tokens the recurrence's passes over groups of tokens, without which few heads
would leave most of the card idle (ops/recurrence/kernels.py), and the gap of 1.5 us between launches. Reads
of weights, and products that are slower than 650 TFLOP/s, are still left out.

With --host a block runs over one token of 128 channels, and our kernels' launches are prepared and then dropped: next
to nothing is computed, and the time is that of Python, torch and launches before a GPU can begin (the least of all
rounds, so that other work on the machine counts little). "host" includes some 3 us that a driver takes for each launch;
"GPU" is a block's time on an H100 by the count above, at the size and tokens of each column. A block takes the greater.
"""

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from unittest.mock import patch

import torch
from common import Parser, head, row
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_peft.adapters.inject import inject
from rwkv_peft.config import AdapterConfig
from rwkv_peft.inference import sampling
from rwkv_peft.models import family_named
from rwkv_peft.ops import bone as bone_op
from rwkv_peft.ops import cross_entropy, mix
from rwkv_peft.ops.bone import cuda as bone
from rwkv_peft.ops.mix import cpu, cuda, functions
from rwkv_peft.ops.recurrence.kernels import RESIDENT, CudaRecurrence, choose_group
from rwkv_peft.ops.wkv6 import WKV6
from rwkv_peft.ops.wkv7 import WKV7

SHAPES = {"1.6B": (2048, 24), "7B": (4096, 32)}  # channels, layers
METHODS = ("frozen", "bat-in", "bone", "bat-out", "lora")
RANK = 64
FLOPS, BANDWIDTH = 650e12, 2.8e12
GAP = 1.5e-6  # seconds between two launches of a queue that does not run dry; 1 to 2 us are published for Hopper
ROW, MULTIPROCESSORS, HEAD_SIZE = 4096, 132, 64
PASSES = {"x060": 6, "x070": 10}  # rows (T, C) that the passes over groups read, forward and backward
STATES = 8  # how often these, and the scan between, write or read the groups' states, float32; RWKV-7's transitions too
CHANNELS = 128  # of a block on the host, of which next to nothing is computed; its feed-forwards have whole tiles
DRIVER = 3e-6  # seconds of a launch that no Python sees
TOKENS = (256, 1024, 4096)
# operations that only look at a tensor in another way, or allocate
FREE = {
    *"view _unsafe_view t transpose permute expand slice select unsqueeze squeeze detach alias as_strided".split(),
    *"unbind split split_with_sizes chunk reshape unflatten narrow lift_fresh _reshape_alias is_same_size".split(),
    *"empty empty_like new_empty new_empty_strided empty_strided diagonal promote_types".split(),
}
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "linear"}


@dataclass(frozen=True)
class Launch:
    """One operation: its name, its bytes, the shapes that it reads, True for a product with a large matrix."""

    name: str
    bytes: int
    shapes: tuple
    is_large: bool


class Counter(TorchDispatchMode):
    """Records the Launches within it; matrices: the sorted shapes of the large matrices."""

    def __init__(self, matrices):
        super().__init__()
        self.matrices, self.launches = matrices, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name.rstrip("_") not in FREE:
            read = {id(x): x for x in tensors_in((args, kwargs or {}))}.values()
            written = tensors_in(out)
            shapes = tuple(tuple(x.shape) for x in read)
            is_large = name in PRODUCTS and any(tuple(sorted(shape)) in self.matrices for shape in shapes)
            self.launches.append(Launch(name, sum(map(real_bytes, [*read, *written])), shapes, is_large))
        return out

    def kernel(self, name, like, tensors, *sizes, **others):
        """Records a kernel's launch, given its tensors by name; one of two names is read and written."""
        moved = sum(real_bytes(x) for x in (*tensors.values(), *others.values()) if isinstance(x, torch.Tensor))
        self.launches.append(Launch(name, moved, (tuple(like.shape),), False))

    def recurrence(self, direction, like, sequences, group, given):
        """The same for a recurrence's kernels, as one launch."""
        self.kernel(f"wkv_{direction}", like, given)

    def mix_kernel(self, name, like, tensors, **others):
        """The same for a mix kernel, and the launches that add up its strips' sums."""
        self.kernel(name, like, tensors, **others)
        for target in {**cuda.LAYOUTS, **cuda.TILED}[name].sums:
            if tensors.get(target) is not None:
                self.launches.append(Launch("sum", real_bytes(tensors[target]), (), False))


def tensors_in(tree):
    """The tensors among nested lists, tuples and dicts."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [tensor for branch in tree for tensor in tensors_in(branch)]


def real_bytes(x):
    """Bytes that x has in memory."""
    count = 1
    for size, stride in zip(x.shape, x.stride()):
        count *= size if stride else 1
    return count * x.element_size()


def count(family, channels, tokens, method):
    """(Launches of a block's forward and backward, its large matrices' elements): block 1 of two, one row of tokens."""
    config = family.new_dimensions(2, channels, 65536)
    with torch.device("meta"):
        model = family.build(config).to(torch.bfloat16)
    adapt(model, method, RANK, family)
    block = model.blocks[1]
    weights = [module.weight for name, module in block.named_modules() if name.endswith(family.targets)]
    x = torch.empty(1, tokens, channels, device="meta", dtype=torch.bfloat16)
    counter = Counter({tuple(sorted(weight.shape)) for weight in weights})
    with ExitStack() as stack:
        for owner, name, value in (
            (torch, "is_autocast_enabled", lambda *_: False),  # which knows no meta device
            (cpu, "call", counter.mix_kernel),
            (bone, "call", counter.kernel),
            (CudaRecurrence, "_launch", counter.recurrence),
        ):
            stack.enter_context(patch.object(owner, name, value))
        inputs = handed_on(model, x)
        counter.launches.clear()
        stack.enter_context(counter)
        *outs, _ = block(*inputs)
        wanted = [*inputs, *(p for p in block.parameters() if p.requires_grad)]
        torch.autograd.grad(outs, wanted, [torch.empty_like(out) for out in outs])  # also of what is carried on
    return counter.launches, sum(weight.numel() for weight in weights)


def handed_on(model, x):
    """The outputs of a model's block 0, given x (B, T, C), as leaves that have gradients."""
    with torch.no_grad():
        *outs, _ = model.blocks[0](x, *model.carried)
    return [out.clone().requires_grad_() for out in outs]


def adapt(model, method, rank, family):
    """Inject the adapter of a member of METHODS, or freeze the model."""
    if method == "frozen":
        model.requires_grad_(False)
        return
    name = "lora" if method == "lora" else "bone"
    inject(model, AdapterConfig(method=name, mode=method if name == "bone" else "bat-in", rank=rank), family=family)


def figures(family, channels, tokens, method):
    """{launches, units, ratio, seconds, one_row} of a block; ratio: its seconds to those of its floor; one_row: the
    same at 1 x 4096, with passes over groups and gaps between launches."""
    launches, elements = count(family, channels, tokens, method)
    moved = sum(launch.bytes for launch in launches if not launch.is_large)
    floor = 4 * elements * tokens / FLOPS  # output and input gradient, 2 operations each
    seconds = floor + moved / BANDWIDTH
    units = moved / (2 * tokens * channels)
    passes, more = passes_over_groups(family, channels)
    gaps = GAP * (len(launches) + passes) * tokens / ROW
    found = {"launches": len(launches), "units": units, "ratio": seconds / floor, "seconds": seconds}
    return found | {"one_row": (seconds + more * tokens / ROW / BANDWIDTH + gaps) / floor}


def passes_over_groups(family, channels):
    """Launches and bytes before the recurrence's own kernels, forward and backward, for ROW tokens."""
    heads = channels // HEAD_SIZE
    group = choose_group(1, ROW, heads, 1, RESIDENT * MULTIPROCESSORS)
    if not group:
        return 0, 0
    states = 4 * -(-ROW // group) * channels * HEAD_SIZE
    return 4, 2 * PASSES[family.version] * ROW * channels + STATES * states * (2 if family.version == "x070" else 1)


def loss_passes(rows=64, vocabulary=65536):
    """The number of times that the loss with its gradient reads or writes the logits, in bfloat16."""
    logits = torch.empty(rows, vocabulary, device="meta", dtype=torch.bfloat16)
    targets = torch.empty(rows, device="meta", dtype=torch.int64)
    counter = Counter(set())
    with patch.object(cross_entropy, "call", lambda *rest, **others: counter.kernel("loss", *rest, **others)), counter:
        cross_entropy.cross_entropy_(logits, targets, 1.0, 1e-4)
    return sum(launch.bytes for launch in counter.launches) / real_bytes(logits)


def drawing(rows=64, vocabulary=65536):
    """(launches, bytes for each of the logits) of a draw with --top_p, which a CUDA graph holds."""
    logits = torch.empty(rows, vocabulary, device="meta")
    uniforms, numbers = (torch.empty(size, device="meta", dtype=torch.float64) for size in (rows, 2))
    with Counter(set()) as counter:
        sampling.select(logits, uniforms, numbers)
    return len(counter.launches), sum(launch.bytes for launch in counter.launches) / logits.numel()


# --- on the processor that drives a GPU


class Dropped:
    """Kernels whose launches are dropped."""

    def run(self, *arguments):
        return 0


def gpu_path():
    """A context in which a CPU's tensors take a GPU's code path."""
    stack = ExitStack()
    for owner, name, value in (
        (mix, "has_kernel", lambda *_: True),
        (functions, "CpuLerp", functions.GpuLerp),
        (cpu, "call", cuda.call),
        (cuda.FAMILY, "kernels", lambda _: Dropped()),
        (bone.FAMILY, "kernels", lambda _: Dropped()),
        (bone_op, "backend", lambda *_, **__: bone),
    ):
        stack.enter_context(patch.object(owner, name, value))
    for recurrence in (WKV6, WKV7):
        stack.enter_context(patch.object(recurrence, "choose", lambda *_: "cuda"))
        stack.enter_context(patch.object(recurrence.cuda.family, "kernels", lambda _: Dropped()))
    return stack


def host_seconds(family, method, rounds):
    """The least processor time of a block's forward and backward: block 1 of two."""
    torch.manual_seed(0)
    model = family.build(family.new_dimensions(2, CHANNELS, 256)).to(torch.bfloat16)
    adapt(model, method, 16, family)
    block, trained = model.blocks[1], [p for p in model.blocks[1].parameters() if p.requires_grad]
    times = []
    with gpu_path():
        inputs = handed_on(model, torch.zeros(1, 1, CHANNELS, dtype=torch.bfloat16))
        grads = [torch.zeros_like(x) for x in inputs]  # as what it hands on is
        for _ in range(rounds):
            start = time.process_time()
            torch.autograd.backward(block(*inputs)[:-1], grads)
            times.append(time.process_time() - start)
            for tensor in (*inputs, *trained):
                tensor.grad = None
    return min(times)


def gpu_seconds(family, method, size, tokens):
    """A block's seconds on an H100 that waits for nothing: its floor, and the bytes outside it."""
    channels = SHAPES[size][0]
    found = figures(family, channels, 2 * channels, method)
    return found["seconds"] * tokens / (2 * channels)


# --- tables


def main(argv=None):
    parser = Parser(__doc__, generations=("x070",), methods=("frozen",), rounds=1)
    parser.add_argument("--generations", nargs="+", default=("x060", "x070"))
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--host", action="store_true", help="the time on the processor that drives a GPU")
    parser.add_argument("--rounds", type=int, default=200, help="of --host")
    args = parser.parse_args(argv)
    if args.host or args.quick:
        on_host(args)
    if not args.host:
        counted(args)
    return 0


def counted(args):
    """Print the table of counts."""
    columns = [f"{figure}, {size}" for size in SHAPES for figure in ("units", "step / floor", f"at 1 x {ROW}")]
    head("generation", "method", "launches", *columns)
    for version in args.generations:
        family = family_named(version)
        for method in args.methods or METHODS:
            found = [figures(family, channels, 2 * channels, method) for channels, _ in SHAPES.values()]
            cells = (f"{one['units']:.0f} | {one['ratio']:.2f} | {one['one_row']:.2f}" for one in found)
            row(family.name, method, found[0]["launches"], *cells)
    print(f"\nThe loss reads or writes the logits {loss_passes():.1f} times.")
    print("A draw with --top_p has {} launches and moves {:.0f} bytes for each of the logits.".format(*drawing()))


def on_host(args):
    """Print the table of times on the host, beside the GPU's."""
    torch.set_num_threads(1)
    columns = [(size, tokens) for size in SHAPES for tokens in TOKENS]
    head("generation", "method", "launches", "host, us", *(f"GPU, {size}, {tokens}" for size, tokens in columns))
    for version in args.generations:
        family = family_named(version)
        for method in args.methods or ("frozen", "bat-in", "lora"):
            launches = len(count(family, 2048, 4096, method)[0])
            host = host_seconds(family, method, args.rounds) + DRIVER * launches
            cells = (f"{1e6 * gpu_seconds(family, method, *column):.0f}" for column in columns)
            row(family.name, method, launches, f"{1e6 * host:.0f}", *cells)


if __name__ == "__main__":
    sys.exit(main())
