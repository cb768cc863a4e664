"""Time of a whole training step, by generation and method, and the shares of its parts.

    python benchmarks/step.py                                   (both shapes, every method, RWKV-6)
    python benchmarks/step.py --models x060 x070 --shapes 768x3072x12 --methods bat-in --dtypes fp32 bf16 --tokens 512
    python benchmarks/step.py --instructions avx2 avx512 all --models x070 --shapes 768x3072x12 --dtypes fp32 bf16

Shapes are CxFxL: channels, feed-forward channels, layers (2048x7168 are the 1.6B's, at a reduced depth); the vocabulary
is World's, and low-rank widths are those of a new model. A step is forward, loss, backward, gradient clipping and
AdamW, as the trainer runs it. "floor" is only the frozen matrix products, output and input gradient of every linear
layer and of the head, which no adapter can avoid, each by the fastest of torch in the model's dtype, torch in float32
and oneDNN in float32. Floor and methods run once in each round, in turn, so that a machine's drift affects all of them;
the medians of times and of ratios within a round are printed. "by torch's float32" is the same step where float32 is
left to torch's library, and halves are converted to it: what an unknown processor does. The shares are of one more step
under torch's profiler, which slows small operations down: read them as proportions.

--instructions prints the tables for this processor told to be an older one, all: as it is. One thread; processor time.
"""

import gc
import itertools
import os
import subprocess
import sys
import time
from functools import partial

import torch
from common import Parser, head, in_turns, median_ms, ratio, row
from torch import nn

from rwkv_peft.adapters.groups import parameter_groups
from rwkv_peft.adapters.inject import inject
from rwkv_peft.config import AdapterConfig
from rwkv_peft.memory import keep_freed_memory
from rwkv_peft.models import FAMILIES, family_named
from rwkv_peft.objectives.cross_entropy import linear_cross_entropy
from rwkv_peft.ops import products

SHAPES = ("768x2688x12", "2048x7168x2")
METHODS = ("bat-in", "bone", "bat-out", "lora", "none")
CONVERTED = "by torch's float32"
PARTS = ("gemm", "adapter", "wkv", "norm", "mix", "loss", "optimizer", "other")
DECAYS = ("time_decay", "w0")
# torch and oneDNN read when they are loaded, and so by processes of their own, which instructions they may use
INSTRUCTIONS = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "all": {},
}
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")

# What the profiler calls the operations of each part, theirs of the backward pass included.
WORDS = (
    ("wkv", ("wkv6", "wkv7", "WKV", "Differentiable")),  # the last of ops/recurrence
    ("adapter", ("_Bat", "_Bone", "_Lora", "_Linear", "KeyUpToTile", "ValueOfSquare")),
    ("loss", ("ChunkedHead",)),
    ("optimizer", ("Optimizer", "clip", "AccumulateGrad")),
    ("norm", ("layer_norm", "group_norm", "NormBackward", "NormGate", "NormBonusGate")),
    ("mix", ("CpuLerp", "GpuLerp", "SigmoidGate", "ReluSquare", "DeltaKeys", "ValueResidual")),
)


def main():
    parser = Parser(__doc__, shapes=("64x96x2",), methods=("bat-in",), vocab=64, rank=8, tokens=32, rounds=1, threads=1)
    parser.add_argument("--models", nargs="+", choices=[family.version for family in FAMILIES], default=("x060",))
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=("fp32",))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024, help="of each row of the batch")
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processor_time", action="store_true", help="instead of the clock's, on a busy machine")
    parser.add_argument(
        "--instructions", nargs="+", choices=INSTRUCTIONS, help="a processor that has no more than these"
    )
    args = parser.parse_args()
    if args.instructions:
        return print_instructions(args.instructions)
    # the profiler's library takes its settings from the environment alone; at any other it prints a line a session
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the trainer does
    print(f"torch {torch.__version__}, CPU, {args.threads} thread(s), rank {args.rank}, median of {args.rounds} rounds")
    print(f"products: {products.row()}")
    for shape in args.shapes:
        C, F_, L = map(int, shape.split("x"))
        for version, dtype in itertools.product(args.models, args.dtypes):
            family = family_named(version)
            table(family, family.new_dimensions(L, C, args.vocab, dim_ffn=F_), dtype, args)


def print_instructions(names):
    """Print the tables of --instructions, those of each by a process of its own."""
    for name in names:
        print(f"\n{name}:", flush=True)
        command = [sys.executable, *sys.argv, "--threads", "1", "--processor_time"]
        at = command.index("--instructions")
        del command[at : at + 1 + len(names)]
        subprocess.run(command, env={**os.environ, **INSTRUCTIONS[name]}, check=True)


def table(family, config, dtype, args):
    """Print one table: a row for each method."""
    kind = {"device": "cpu", "dtype": torch.float32 if dtype == "fp32" else torch.bfloat16}
    print(
        f"\n{family.name}, C {config.n_embd}, F {config.dim_ffn}, {config.n_layer} layers, "
        f"vocabulary {config.vocab_size}, {args.batch} x {args.tokens} tokens, {dtype}\n"
    )
    weights = random_weights(family, config, kind)
    steps = {"floor": make_floor(linear_weights(family, weights), args.batch * args.tokens)}
    for method in args.methods:
        steps[method] = make_step(family, config, weights, method, kind, args)
        steps[method, CONVERTED] = products.computing(products.CONVERTING)(steps[method])
    times = in_turns(steps, args.rounds, time.process_time if args.processor_time else time.perf_counter)
    floor = times["floor"]
    head("method", "ms", "/ floor", "by torch's float32, ms", *PARTS)
    row("floor", f"{median_ms(floor):.0f}", 1, "", "100 %", *[""] * (len(PARTS) - 1))
    for method in args.methods:
        parts = shares(steps[method], linear_weights(family, weights))
        row(
            method,
            f"{median_ms(times[method]):.0f}",
            f"{ratio(times[method], floor):.2f}",
            f"{median_ms(times[method, CONVERTED]):.0f}",
            *(f"{100 * parts[part]:.1f} %" for part in PARTS),
        )


def random_weights(family, config, kind):
    """A state dict of plausible scale."""
    torch.manual_seed(0)
    state = {}
    for name, shape in family.shapes(config).items():
        tensor = torch.empty(shape)
        if name.endswith(DECAYS):
            state[name] = tensor.uniform_(-6, -1)
        elif len(shape) == 1 or shape[:2] == (1, 1):
            state[name] = tensor.uniform_(0, 1)
        else:
            state[name] = tensor.normal_() / shape[-1] ** 0.5
    return {name: tensor.to(**kind) for name, tensor in state.items()}


def linear_weights(family, weights):
    """The matrices of the model's linear layers, the head's last."""
    return [weight for name, weight in weights.items() if weight.dim() == 2 and family.part_of(name) in (None, "head")]


def make_floor(matrices, tokens):
    """A function that multiplies by every linear layer's weight, forward and for the input's gradient."""
    *others, head = matrices
    chunk = max(1, 2**25 // head.shape[0])  # the loss never holds all logits, so neither does its floor
    rows = [(weight, tokens) for weight in others]
    rows += [(head, min(chunk, tokens - start)) for start in range(0, tokens, chunk)]
    inputs = {(count, n): torch.randn(count, n).to(head) for weight, count in rows for n in weight.shape}
    pairs = [(inputs[count, b.shape[0]], b) for weight, count in rows for b in (weight.t(), weight)]
    fastest = {}  # by shapes and the order in memory
    for a, b in pairs:
        kind = a.shape, b.shape, b.stride()
        if kind not in fastest:
            ways = [(torch.mm, a.dtype), (torch.mm, torch.float32), *ONEDNN]
            times = in_turns({(way, dtype): partial(way, a.to(dtype), b.to(dtype)) for way, dtype in ways}, 2)
            fastest[kind] = min(times, key=lambda choice: min(times[choice]))
    chosen = [(*fastest[a.shape, b.shape, b.stride()], a, b) for a, b in pairs]
    work = [(way, a.to(dtype), b.to(dtype)) for way, dtype, a, b in chosen]

    def step():
        for way, a, b in work:
            way(a, b)

    return step


def make_step(family, config, weights, method, kind, args):
    """A function that trains one step on random tokens."""
    model = family.load(weights if method != "none" else {name: w.clone() for name, w in weights.items()}, config)
    rank = args.rank
    if method == "lora":  # as many parameters as bat-in, at a square matrix
        rank = max(1, args.rank // 2)
    word = {"method": method} if method in ("lora", "none") else {"method": "bone", "mode": method}
    adapter = AdapterConfig(**word, rank=rank)
    inject(model, adapter, family=family)
    trained = [p for p in model.parameters() if p.requires_grad]
    if method != "none":
        for parameter in trained:
            nn.init.normal_(parameter, std=1e-3)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-5, fused=True)
    tokens = torch.randint(config.vocab_size, (args.batch, args.tokens + 1), device=kind["device"])
    head = partial(
        linear_cross_entropy,
        targets=tokens[:, 1:],
        count=args.batch * args.tokens,
        counted=torch.arange(args.batch * args.tokens, device=kind["device"]),
    )

    def step():
        loss, _ = model(tokens[:, :-1], head=head)
        loss.backward()
        with torch.profiler.record_function("clip"):
            nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def onednn(a, b):
    """a b of float32 by oneDNN's operator; torch.mm gives it bfloat16 itself."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


ONEDNN = [(onednn, torch.float32)] if torch.backends.mkldnn.is_available() else []


def timed(step, device, clock):
    start = clock()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def shares(step, matrices):
    """The share of each of PARTS in a step's time; time outside of any operation is "other"."""
    shapes = {tuple(sorted(weight.shape)) for weight in matrices}
    gc.collect()
    gc.disable()  # the profiler's own objects make Python look for garbage, in whatever operation runs
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        start = time.perf_counter()
        step()
        wall = 1e6 * (time.perf_counter() - start)
    gc.enable()
    spent = dict.fromkeys(PARTS, 0.0)
    for event in profile.events():
        spent[part_of(event, shapes)] += event.self_cpu_time_total
    spent["other"] += max(0.0, wall - sum(spent.values()))
    total = sum(spent.values())
    return {part: time_ / total for part, time_ in spent.items()}


def part_of(event, shapes):
    """The part of a step that a profiler event belongs to: by its own name, else by that of an enclosing event."""
    if event.name in MATRIX_PRODUCTS and any(tuple(sorted(shape)) in shapes for shape in event.input_shapes if shape):
        return "gemm"
    own = event.name
    while event is not None:
        for part, words in WORDS:
            if any(word in event.name for word in words):
                return part
        event = event.cpu_parent
    # What remains of torch's operations are sums, tanh and the small products around the interpolation.
    return "mix" if own.startswith("aten::") else "other"


if __name__ == "__main__":
    main()
