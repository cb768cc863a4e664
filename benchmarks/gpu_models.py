"""Whole models on a GPU: gradients against float64, steps of training, decoding. One JSON object in each line.

    python benchmarks/gpu_models.py smoke x070 [--methods bat-in bone lora] [--batches plain packed]
    python benchmarks/gpu_models.py step x070 [--methods bat-in] [--rows 1x4096 1x64] [--dtype bf16]
    python benchmarks/gpu_models.py decode x070 [--weights bf16 int8] [--sequences 1 64 256]

"smoke" compares the loss and each gradient of the demo's model, in bfloat16, with the same in float64 and plain torch;
both may be three times as far from it as plain torch's in bfloat16, because that has the recurrence in float32. It
prints which kernels were launched. Rows are long and few enough that time is split.

"step" is a bare training step of a random model of --shape (channels, feed-forward channels, layers), beside its frozen
matrix products alone ("floor") and the time until all of it is enqueued ("host"). "waits" names the lines at which the
host waited for the GPU; there should be none. The plan's peak is `rwkv-peft plan`'s without CUDA's context; under
DeepSpeed the optimizer is in float32, here it is not.

"decode" continues prompts of 8 tokens greedily, with CUDA graphs and without. weights_gb_s is the rate at which the
weights are read, if each step reads them once.

Exit code 1 if a gradient is wrong, 3 if memory does not suffice for a case; the others are measured all the same.
"""

import itertools
import statistics
import sys
import time
import warnings
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import step as step_program
import torch
from common import DEMO, Parser, adapter_of, peak_gib, reset_peak, tell, without_room
from gpu_kernels import FAMILIES, plain_torch, poison

from rwkv_peft.adapters.inject import inject
from rwkv_peft.checkpoints.base import open_base
from rwkv_peft.models import family_named
from rwkv_peft.objectives.cross_entropy import linear_cross_entropy
from rwkv_peft.ops.native.cuda import CudaFamily
from rwkv_peft.tools.plan.command import estimate_of, parse_flags
from rwkv_peft.training.estimate.memory import CONTEXT, GPU, peak

SHAPE = "2048x7168x24"  # channels, feed-forward channels, layers: of 1.6 G parameters
VOCABULARY = 65536
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEXT = (
    "The wind is strong. Rob has 4 blue maps.\nQ: What things?\nA: maps\nQ: How many?\nA: 4\nA dog sleeps. So what?\n"
)
FACTOR, LEAST, MEAN_LEAST = 3, 3e-2, 1e-2  # of plain torch's errors, and errors that bfloat16 may have in any case
PROMPT = 8


def random_model(version, shape, vocabulary, device, dtype=torch.bfloat16):
    """(a Family, the dimensions, a state dict on the device) of a random model."""
    family = family_named(version)
    channels, ffn, layers = map(int, shape.split("x"))
    config = family.new_dimensions(layers, channels, vocabulary, dim_ffn=ffn)
    with torch.device(device):  # a processor's random numbers take longer than a step
        return family, config, step_program.random_weights(family, config, {"device": device, "dtype": dtype})


def wait(device):
    if device != "cpu":
        torch.cuda.synchronize()


# --- gradients against float64


def smoke(args):
    """Check every method and batch -> 1 if one is wrong."""
    base = open_base(DEMO[args.version])
    launched, wrong = set(), []
    for case in itertools.product(args.methods, args.batches):
        try:
            right = smoke_one(args, base, *case, launched)
        except RuntimeError as failure:  # a launch that failed says so; after some no kernel runs in this process
            right = tell(case=" ".join(case), failed=str(failure).splitlines()[0])
        wrong += [] if right else [" ".join(case)]
    names = {name for family in FAMILIES for name in family.names}
    tell(wrong=wrong, kernels_launched=len(launched), kernels_not_launched=sorted(names - launched))
    return int(bool(wrong))


def smoke_one(args, base, method, rows, launched):
    """Print one case, with the errors of wrong gradients, ours and plain torch's -> True if it is right."""
    make = partial(adapted, base, method, args)
    model, batch = make(torch.bfloat16), demo_batch(rows, args)
    with plain_torch():
        truth, plain = (found(make(dtype), batch) for dtype in (torch.float64, torch.bfloat16))
    here = set()
    with recorded(here):
        poison(args.device)
        ours = found(model, batch)
        again = [found(model, batch) for _ in range(args.repeats)]
    repeated = all(torch.equal(ours[name], one[name]) for one in again for name in ours)
    mine, theirs = errors(ours, truth), errors(plain, truth)
    wrong = [name for name in truth if not mine[name] <= FACTOR * max(theirs.values()) + LEAST]  # which NaN is not
    means = [statistics.mean(each.values()) for each in (mine, theirs)]
    right = not wrong and means[0] <= FACTOR * means[1] + MEAN_LEAST
    launched |= here
    tell(
        generation=args.version,
        method=method,
        rows=rows,
        right=right,
        repeated=repeated,
        wrong={name: [mine[name], theirs[name]] for name in wrong[:5]},
        largest_errors=[max(mine.values()), max(theirs.values())],
        mean_errors=means,
        kernels=sorted(here),
    )
    return repeated and right and (bool(here) or args.device == "cpu")


def demo_batch(rows, args):
    """(tokens (1, T), targets (1, T), the bounds of packed sequences or None) of a text that the demo's models have
    learned, because on random tokens their gradients are mostly rounding errors."""
    count = args.tokens
    row = torch.tensor([*(TEXT * (count // len(TEXT) + 1)).encode()], device=args.device)[None, : count + 1] + 1
    bounds = (torch.arange(5) * count // 4).to(args.device) if rows == "packed" else None
    return row[:, :-1], row[:, 1:], bounds


def adapted(base, method, args, dtype):
    """A base's model in a dtype, with an adapter that is not zero; its numbers are rounded to bfloat16."""
    torch.manual_seed(0)
    model = base.family.load({name: x.to(args.device, torch.bfloat16) for name, x in base.tensors.items()}, base.config)
    inject(model, adapter_of(method, args.rank), family=base.family)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=1e-3)
    return model.to(dtype)


@contextmanager
def recorded(launched):
    """A context in which the names of launched kernels are put into a set."""
    run = CudaFamily.run

    def recording(self, name, *rest, **others):
        launched.add(name)
        return run(self, name, *rest, **others)

    with patch.object(CudaFamily, "run", recording):
        yield


def found(model, batch):
    """{"loss": loss, name of a trained tensor: its gradient} in float64."""
    tokens, targets, bounds = batch
    counted = torch.arange(targets.numel(), device=targets.device)
    head = partial(linear_cross_entropy, targets=targets, count=targets.numel(), counted=counted)
    model.zero_grad(set_to_none=True)
    loss, _ = model(tokens, head=head, cu_seqlens=bounds)
    loss.backward()
    trained = {name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach().double(), **trained}


def errors(values, truth):
    """{name: error relative by norm}; a gradient far below the others in norm is the rest after others cancelled, so
    that its error is compared with at least a tenth of their mean."""
    norms = {name: true.norm() for name, true in truth.items()}
    least = 0.1 * torch.stack(list(norms.values())[1:]).mean()
    scales = {name: norm if name == "loss" else torch.maximum(norm, least) for name, norm in norms.items()}
    return {name: float((values[name] - true).norm() / scales[name]) for name, true in truth.items()}


# --- steps of training


def steps(args):
    """Time each method's step at each number of rows and tokens -> an exit code."""
    made = random_model(args.version, args.shape, args.vocab, args.device, DTYPES[args.dtype])
    codes = []
    for method, rows in itertools.product(args.methods, args.rows):
        entry = dict(generation=args.version, method=method, dtype=args.dtype, rows=rows)
        codes.append(without_room(partial(step, args, *made, entry), **entry))
    return max(codes)


def step(args, family, config, weights, entry):
    """Print the result for one method, and one number of rows and tokens."""
    args.batch, args.tokens = map(int, entry["rows"].split("x"))
    kind = {"device": args.device, "dtype": DTYPES[args.dtype]}
    train = step_program.make_step(family, config, weights, entry["method"], kind, args)
    floor = step_program.make_floor(step_program.linear_weights(family, weights), args.batch * args.tokens)
    reset_peak(args.device)
    rounds = []
    for number in range(args.rounds + 2):  # the first compile, and warm up
        if number == 2:
            reset_peak(args.device)
            rounds.clear()
        least = step_program.timed(floor, args.device, time.perf_counter)
        wait(args.device)
        start = time.perf_counter()
        train()
        enqueued = time.perf_counter() - start
        wait(args.device)
        rounds.append((time.perf_counter() - start, least, enqueued))
    seconds, least, host = map(statistics.median, zip(*rounds))
    tell(
        **entry,
        ms=round(1e3 * seconds, 2),
        tokens_per_s=round(args.batch * args.tokens / seconds),
        floor_ms=round(1e3 * least, 2),
        of_floor=round(seconds / least, 2),
        host_ms=round(1e3 * host, 2),
        host_us_a_block=round(1e6 * host / config.n_layer),
        planned_gib=planned_gib(args, entry["method"]),
        **peak_gib(args.device),
        **({} if args.device == "cpu" else {"waits": waits_in(train)}),
    )
    if args.profile:
        for name, calls, microseconds in largest(train, args.profile, args.device):
            tell(operation=name, calls=calls, us=microseconds)


def largest(train, count, device):
    """(name, calls, microseconds) of the kernels of a step that take the longest, by torch's profiler; on a CPU of its
    operations, without those that they call."""
    activities = torch.profiler.ProfilerActivity
    kind, clock = ("CPU", "self_cpu_time_total") if device == "cpu" else ("CUDA", "self_device_time_total")
    with torch.profiler.profile(activities={activities.CPU, getattr(activities, kind)}) as profile:
        train()
        wait(device)
    events = [event for event in profile.key_averages() if event.device_type.name == kind]
    events.sort(key=lambda event: getattr(event, clock), reverse=True)
    return [(event.key, event.count, round(getattr(event, clock))) for event in events[:count]]


def planned_gib(args, method):
    """The plan's peak for the same run."""
    channels, ffn, layers = args.shape.split("x")
    flags = ["--n_embd", channels, "--dim_ffn", ffn, "--n_layer", layers, "--vocab_size", str(args.vocab)]
    flags += ["--model_version", args.version, "--precision", args.dtype]
    if method == "lora":
        flags += ["--peft", "lora", "--lora_config", f'{{"lora_r": {args.rank // 2}}}']
    else:
        flags += ["--peft", "none"] if method == "none" else ["--bone_mode", method, "--bone_r", str(args.rank)]
    estimate = estimate_of(parse_flags(flags), GPU)
    return round((peak(estimate.parts(args.batch, args.tokens), GPU) - CONTEXT) / 2**30, 2)


def waits_in(step):
    """The lines at which one step waits for the GPU."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sorted({f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)})


# --- decoding


def decode(args):
    """Time each kind of weights and number of sequences, with CUDA graphs and without -> an exit code."""
    from rwkv_peft.inference.weights import quantize_products

    codes = []
    for weights in args.weights:
        family, config, tensors = random_model(args.version, args.shape, args.vocab, args.device)
        model = family.load(tensors, config).requires_grad_(False).eval()
        if weights != "bf16":
            quantize_products(model, weights, lambda text: None)
            model.to(args.device)
        for sequences, graphs in itertools.product(args.sequences, (True, False)):
            entry = dict(generation=args.version, weights=weights, sequences=sequences, graphs=graphs)
            codes.append(without_room(partial(decode_one, args, model, entry), **entry))
    return max(codes)


def decode_one(args, model, entry):
    """Print the result for one number of sequences, with CUDA graphs or without."""
    from rwkv_peft.inference import forward
    from rwkv_peft.inference.weights import rounded

    sequences = entry["sequences"]
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, args.vocab, (sequences, PROMPT), generator=generator).tolist()
    reset_peak(args.device)
    with patch.object(forward, "recordable", forward.recordable if entry["graphs"] else lambda model: False):
        draw(model, prompts, 4, args.device)  # compiles, and warms up
        seconds = min(draw(model, prompts, args.new_tokens, args.device) for _ in range(args.rounds))
    read = [*model.parameters(), *(product.weight for product in rounded(model).values())]
    tell(
        **entry,
        tokens_per_s=round(args.new_tokens * sequences / seconds, 1),
        ms_a_step=round(1e3 * seconds / args.new_tokens, 3),
        weights_gb_s=round(sum(x.nbytes for x in read) * args.new_tokens / 1e9 / seconds, 1),
        **peak_gib(args.device),
    )


def draw(model, prompts, tokens, device):
    """The seconds for so many more tokens of each sequence."""
    from rwkv_peft.inference.decode import generate
    from rwkv_peft.inference.settings import Sampling

    drawing = generate(model, prompts, Sampling(temperature=0), tokens + 1, batch=len(prompts))
    for _ in prompts:  # the first token of each comes of reading its prompt
        next(drawing)
    wait(device)
    start = time.perf_counter()
    drawn = sum(1 for _ in drawing)
    assert drawn == tokens * len(prompts), f"{drawn} tokens were drawn"
    return time.perf_counter() - start


PARTS = {"smoke": smoke, "step": steps, "decode": decode}
QUICK = dict(
    part="step", version="x070", device="cpu", methods=("bat-in",), batches=("plain",), rows=("1x32",), tokens=8,
    rank=8, repeats=1, rounds=1, shape="64x96x2", vocab=64, sequences=(1, 2), new_tokens=2
)  # fmt: skip


def main(argv=None):
    parser = Parser(__doc__, **QUICK)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("version", choices=("x060", "x070"))
    parser.add_argument("--methods", nargs="+", default=("bat-in", "bone", "lora"), choices=step_program.METHODS)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batches", nargs="+", default=("plain", "packed"), choices=("plain", "packed"))
    parser.add_argument("--tokens", type=int, default=640, help="of smoke's row")
    parser.add_argument("--repeats", type=int, default=5, help="of smoke")
    parser.add_argument("--rows", nargs="+", default=("1x4096", "1x1024", "1x64"), metavar="ROWSxTOKENS")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of step")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="also a step's N largest kernels")
    parser.add_argument("--weights", nargs="+", default=("bf16", "int8"), choices=("bf16", "int8", "int4"))
    parser.add_argument("--sequences", type=int, nargs="+", default=(1, 64, 256))
    parser.add_argument("--new_tokens", type=int, default=64, help="of each sequence in a round of decoding")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", default=SHAPE, help="channels, feed-forward channels, layers")
    parser.add_argument("--vocab", type=int, default=VOCABULARY)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(argv)
    return PARTS[args.part](args)


if __name__ == "__main__":
    sys.exit(main())
