"""A training step of a generation and a method on a GPU: its time, its memory beside the plan's, and lines that wait.

    python benchmarks/gpu_steps.py x070 bat-in [--rows 1x4096 1x1024 1x64] [--dtype bf16] [--shape 2048x7168x24]

One JSON object for each number of rows and tokens, as soon as it is known; one that needs more memory than there is
says so, and the next is tried (exit code 3). "floor" is the frozen matrix products alone, as in step.py. "host" is the
time until all of a step is enqueued: with few tokens that is the processor's whole time for it, told by block as well.
"waits" names the lines at which the host waited for the GPU, by set_sync_debug_mode; there should be none. The plan's
peak is that of `rwkv-peft plan` without CUDA's context: under DeepSpeed the optimizer is in float32, here it is not.
"""

import statistics
import sys
import time
import warnings

import step as step_program
import torch
from common import Parser
from gpu_models import SHAPE, VOCABULARY, peak_gib, random_model, reset_peak, tell, wait, without_room

from rwkv_peft.tools.plan.command import estimate_of, parse_flags
from rwkv_peft.tools.plan.memory import CONTEXT, GPU, peak

ROWS = ("1x4096", "1x1024", "1x64")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rows_and_tokens(text):
    rows, tokens = map(int, text.split("x"))
    return rows, tokens


def planned_gib(args, rows, tokens):
    """The plan's peak for the same run."""
    channels, ffn, layers = args.shape.split("x")
    shape = ("--n_embd", channels, "--dim_ffn", ffn, "--n_layer", layers, "--vocab_size", args.vocab)
    method = {"lora": ("--peft", "lora"), "none": ("--peft", "none")}.get(args.method, ("--bone_mode", args.method))
    rank = ("--lora_config", f'{{"lora_r": {args.rank // 2}}}') if args.method == "lora" else ("--bone_r", args.rank)
    rank = () if args.method == "none" else rank
    flags = (*shape, "--model_version", args.version, "--precision", args.dtype, *method, *rank)
    estimate = estimate_of(parse_flags([*map(str, flags)]), GPU)
    return round((peak(estimate.parts(rows, tokens), GPU) - CONTEXT) / 2**30, 2)


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


def measure(args, family, config, weights, rows):
    """Print the result for one number of rows and tokens."""
    args.batch, args.tokens = rows_and_tokens(rows)
    step = step_program.make_step(family, config, weights, args.method, kind_of(args), args)
    floor = step_program.make_floor(step_program.linear_weights(family, weights), args.batch * args.tokens)
    reset_peak(args.device)
    times, floors, hosts = [], [], []
    for round_ in range(args.rounds + 2):  # the first compile, and warm up
        floors.append(step_program.timed(floor, args.device, time.perf_counter))
        wait(args.device)
        start = time.perf_counter()
        step()
        hosts.append(time.perf_counter() - start)
        wait(args.device)
        times.append(time.perf_counter() - start)
        if round_ == 1:
            del times[:], floors[:], hosts[:]
            reset_peak(args.device)
    host, seconds, least = (statistics.median(some) for some in (hosts, times, floors))
    tell(
        generation=args.version,
        method=args.method,
        dtype=args.dtype,
        rows=rows,
        ms=round(1e3 * seconds, 2),
        tokens_per_s=round(args.batch * args.tokens / seconds),
        floor_ms=round(1e3 * least, 2),
        of_floor=round(seconds / least, 2),
        host_ms=round(1e3 * host, 2),
        host_us_a_block=round(1e6 * host / config.n_layer),
        planned_gib=planned_gib(args, args.batch, args.tokens),
        **peak_gib(args.device),
        **({} if args.device == "cpu" else {"waits": waits_in(step)}),
    )


def kind_of(args):
    return {"device": args.device, "dtype": DTYPES[args.dtype]}


QUICK = dict(version="x070", method="bat-in", device="cpu", shape="64x96x2", vocab=64, rank=8, rows=("1x32",), rounds=1)


def main(argv=None):
    parser = Parser(__doc__, **QUICK)
    parser.add_argument("version", choices=("x060", "x070"))
    parser.add_argument("method", choices=step_program.METHODS)
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROWSxTOKENS")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--shape", default=SHAPE, help="channels, feed-forward channels, layers")
    parser.add_argument("--vocab", type=int, default=VOCABULARY)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(argv)
    family, config, weights = random_model(args.version, args.shape, args.vocab, **kind_of(args))
    entry = dict(generation=args.version, method=args.method, dtype=args.dtype)
    codes = [
        without_room(lambda rows=rows: measure(args, family, config, weights, rows), **entry, rows=rows)
        for rows in args.rows
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
