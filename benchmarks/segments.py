"""Memory and time of a training step on long rows: whole, and in segments with the states carried over.

    python benchmarks/segments.py [--generations x060 x070] [--lengths 2048 8192 32768 65536] [--whole 8192]

A tiny model with Bone's bat-in on every linear layer, float32, one row in each step. Each line is a process of its own;
the memory is the rise of its resident peak in the step. Rows up to --whole tokens are also computed whole.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch

from rwkv_peft.adapters.inject import inject
from rwkv_peft.config import AdapterConfig
from rwkv_peft.models import family_named
from rwkv_peft.training.step.steps import Segments, Whole

VOCABULARY = 257


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", nargs="+", default=("x060", "x070"))
    parser.add_argument("--lengths", nargs="+", type=int, default=(2048, 8192, 32768, 65536))
    parser.add_argument("--whole", type=int, default=8192, help="longest row that is also computed whole")
    parser.add_argument("--segment", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", nargs=2, metavar=("HOW", "T"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        return measure(args.generations[0], args.one[0], int(args.one[1]), args.segment)
    print(f"| model | T | step | memory, MiB | us a token |\n|{'---|' * 5}")
    for generation in args.generations:
        for T in args.lengths:
            for how in ("whole", "segments") if args.whole >= T else ("segments",):
                more = ["--generations", generation, "--segment", str(args.segment), "--threads", str(args.threads)]
                command = [sys.executable, __file__, "--one", how, str(T), *more]
                print(subprocess.run(command, check=True, text=True, capture_output=True).stdout, end="", flush=True)


def measure(generation, how, T, segment):
    """Print the line of one row of T tokens."""
    family = family_named(generation)
    torch.manual_seed(0)
    model = family.build(family.new_dimensions(n_layer=2, n_embd=64, vocab_size=VOCABULARY, head_size=32))
    family.init_weights(model)
    inject(model, AdapterConfig(rank=16), family=family)
    step = Whole() if how == "whole" else Segments(segment)
    take(model, step, 64)  # kernels are built and loaded
    before, start = peak(), time.perf_counter()
    take(model, step, T)
    seconds = time.perf_counter() - start
    print(f"| {family.name} | {T:,} | {how} | {(peak() - before) / 2**20:.0f} | {1e6 * seconds / T:.0f} |")


def take(model, step, T):
    """Forward and backward of one random row."""
    tokens = torch.randint(VOCABULARY, (1, T + 1))
    mask = torch.ones(1, T, dtype=torch.bool)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask, "counted": torch.arange(T)}
    step.loss(model, batch, T).backward()


def peak():
    """The largest resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
