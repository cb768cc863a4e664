"""The time of a step of preference training beside a plain step over the same rows.

    python benchmarks/preferences.py [--generations x060 x070] [--methods bat-in bone lora] [--rounds 7]

Pairs of answers are packed into one row; the plain step takes the loss of the same tokens. Forward and backward, both
in turns in one process: medians, and the median of the ratios within a round.
"""

import argparse
import statistics
import time

import gpu_budget as budget
import torch

from rwkv_peft.data.collate import collate
from rwkv_peft.models import family_named
from rwkv_peft.objectives.dpo import DPO
from rwkv_peft.training.step.steps import Whole

SHAPE = "768x2688x4"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", nargs="+", default=("x060", "x070"))
    parser.add_argument("--methods", nargs="+", default=("bat-in", "bone", "lora"), choices=budget.METHODS[1:])
    parser.add_argument("--shape", default=SHAPE, help=f"channels, feed-forward channels, layers (default {SHAPE})")
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--tokens", type=int, default=256, help="of an answer with its prompt; half of them count")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"| model | method | plain step, ms | pairs, ms | ratio |\n|{'---|' * 5}")
    for version in args.generations:
        for method in args.methods:
            print(measure(family_named(version), method, args), flush=True)


def measure(family, method, args):
    """The line of a generation and a method."""
    torch.manual_seed(0)
    channels, ffn, layers = map(int, args.shape.split("x"))
    model = family.build(family.new_dimensions(layers, channels, args.vocab, dim_ffn=ffn))
    family.init_weights(model)
    budget.adapt(model, method, 64, family)
    mask = torch.arange(args.tokens) >= args.tokens // 2
    row = [(torch.randint(args.vocab, (args.tokens + 1,)), mask) for _ in range(2 * args.pairs)]
    steps, times = (Whole(), Whole(DPO())), []
    for _ in range(args.rounds + 1):  # the first builds kernels
        times.append([seconds(step, model, collate([row])) for step in steps])
    plain, pairs = (1e3 * statistics.median(column) for column in zip(*times[1:]))
    ratio = statistics.median(pair / whole for whole, pair in times[1:])
    return f"| {family.name} | {method} | {plain:.0f} | {pairs:.0f} | {ratio:.2f} |"


def seconds(step, model, batch):
    """The seconds of one forward and backward."""
    start = time.perf_counter()
    step.loss(model, batch, 1).backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
