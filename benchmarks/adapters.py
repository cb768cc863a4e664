"""Time and memory of one adapted linear layer, forward and backward, for every method.

    python benchmarks/adapters.py                                         (every shape, T and dtype: long)
    python benchmarks/adapters.py --shapes 2048x7168 7168x2048 --tokens 2048 --threads 1

Shapes are INxOUT. Each method runs once in each round, in turn, so that a machine's drift affects all of them;
medians are printed. "plain" rows are the definition under autograd: a merged weight for Bone, three linear
layers for LoRA. LoRA's rank gives it as many parameters as bat-in has (and "lora, bone's" as bone has).
Saved are the bytes that autograd keeps for backward besides weight and parameters; peak is the most memory that
forward and backward allocate at one time.
"""

import time
from functools import partial

import torch
from common import Parser, head, in_turns, median_ms, ratio, row, saved_bytes
from torch import nn
from torch.nn import functional as F

from rwkv_peft.adapters.functions.bat_out import bat_out
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.product import Frozen
from rwkv_peft.config import AdapterConfig
from rwkv_peft.memory import keep_freed_memory

SHAPES = ("2048x7168", "7168x2048", "4096x14336", "14336x4096")
METHODS = "frozen|lora|lora, bone's|lora plain|bat-in|bat-in plain|bat-out|bat-out plain|bone|bone plain".split("|")


def main():
    parser = Parser(
        __doc__,
        shapes=("64x96",),
        tokens=(32,),
        dtypes=("fp32",),
        rank=8,
        rounds=1,
        threads=1,
        methods=("frozen", "lora", "bat-in plain"),
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=(512, 1024, 2048, 4096, 8192))
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--crossover", action="store_true", help="bat-out's forward on either side, by tokens, instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        keep_freed_memory()  # as the trainer does
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"torch {torch.__version__}, {where}, rank {args.rank}, median of {args.rounds} rounds")
    for shape in args.shapes:
        in_features, out_features = map(int, shape.split("x"))
        for dtype in args.dtypes:
            if args.crossover:
                crossover(in_features, out_features, dtype, args)
                continue
            for tokens in args.tokens:
                table(in_features, out_features, tokens, dtype, args)


def table(in_features, out_features, tokens, dtype, args):
    """Print one table: a row for each method."""
    torch.manual_seed(0)
    kind = {"device": args.device, "dtype": torch.float32 if dtype == "fp32" else torch.bfloat16}
    base = nn.Linear(in_features, out_features, bias=False, **kind)
    x = torch.randn(tokens, in_features, requires_grad=True, **kind)
    g = torch.randn(tokens, out_features, **kind)
    layers = {method: make_layer(method, base, args.rank) for method in args.methods}
    steps = {method: make_step(layer, x, g, args.device) for method, layer in layers.items()}
    times = in_turns(steps, args.rounds, time.perf_counter)
    print(f"\n{in_features} -> {out_features}, T = {tokens}, {dtype}\n")
    head("method", "parameters", "ms", "/ frozen", "saved MiB", "peak MiB")
    for method, step in steps.items():
        layer = layers[method]
        count = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        slower = ratio(times[method], times["frozen"]) if "frozen" in times else float("nan")
        saved, _ = saved_bytes(partial(layer, x), [*layer.parameters(), *layer.buffers()])
        memory = (f"{size / 2**20:.1f}" for size in (saved, peak_bytes(step, args.device)))
        row(method, f"{count:,}", f"{median_ms(times[method]):.1f}", f"{slower:.3f}", *memory)


def make_layer(method, base, rank):
    """A layer for a method over base's weight; its adapter is not zero."""
    name, *words = method.split(" ", 1) if "," not in method else (method,)
    layer = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
    if name == "frozen":
        return layer
    model = nn.ModuleDict({"layer": layer})
    sides = base.in_features + base.out_features
    if name.startswith("lora"):
        parameters = rank * (base.out_features if name == "lora, bone's" else base.in_features)
        config = AdapterConfig(method="lora", rank=max(1, round(parameters / sides)), targets=("layer",))
    else:
        config = AdapterConfig(mode=name, rank=rank, targets=("layer",))
    inject(model, config)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.01)
    return Plain(model["layer"]) if words == ["plain"] else model["layer"]


class Plain(nn.Module):
    """The definition of an adapter layer, under autograd."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer = self.layer
        if layer.method.alpha is not None:
            return F.linear(x, layer.weight) + F.linear(F.linear(x, layer.lora_A), layer.lora_B) * layer.scale
        return F.linear(x, layer.weight + layer.method.change.delta(layer.weight, {"bone": layer.bone}))


def make_step(layer, x, g, device):
    """A function that runs forward and backward once and drops the gradients."""
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step():
        torch.autograd.grad(layer(x), trained, g)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def peak_bytes(step, device):
    """The most memory in use at one time during a step, above what was in use before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def crossover(in_features, out_features, dtype, args):
    """Print bat-out's forward on the weight side and on the activation side, by number of tokens."""
    kind = {"device": args.device, "dtype": torch.float32 if dtype == "fp32" else torch.bfloat16}
    weight = torch.randn(out_features, in_features, **kind) / in_features**0.5
    bone = 0.01 * torch.randn(out_features // args.rank, args.rank, args.rank, **kind)
    print(f"\n{in_features} -> {out_features}, {dtype}\n")
    head("T", "weight side ms", "activation side ms")
    for tokens in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128):
        x = torch.randn(tokens, in_features, **kind)
        sides = {side: partial(bat_out, x, Frozen(weight), bone, side=side) for side in ("weight", "activation")}
        times = in_turns(sides, args.rounds, time.perf_counter)
        row(tokens, *(f"{median_ms(taken):.2f}" for taken in times.values()))


if __name__ == "__main__":
    main()
