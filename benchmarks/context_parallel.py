"""Time and memory of a training step on one row that ranks share, beside one rank.

    python benchmarks/context_parallel.py [--ranks 1 2] [--lengths 4096 16384 65536] [--layers 8] [--segment 0]

A tiny model with Bone's bat-in on every linear layer, float32, one thread a rank, one row in each step. Each line
starts its ranks, which meet over gloo. Memory is the rise of the resident peak of the rank with the largest; processor
time is that of all ranks. One row takes --repeat steps, of which the fastest counts. With --segment the row goes in
segments.
"""

import argparse
import resource
import socket
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from rwkv_peft.adapters.inject import inject
from rwkv_peft.config import AdapterConfig
from rwkv_peft.models import family_named
from rwkv_peft.objectives.next_token import NextToken
from rwkv_peft.training.step.relay import Line, in_flight, waiting
from rwkv_peft.training.step.shared import SharedRows, SharedSegments
from rwkv_peft.training.step.steps import Segments, Whole

VOCABULARY, WARM = 257, 256
COLUMNS = "model | T | ranks | step, s | processor time, s | waiting by count | memory of a rank, MiB | loss"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", nargs="+", default=("x060", "x070"))
    parser.add_argument("--ranks", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--lengths", nargs="+", type=int, default=(4096, 16384, 65536))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--segment", type=int, default=0, help="tokens of a segment, 0: whole rows")
    parser.add_argument("--grad_cp", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--one", nargs=2, type=int, metavar=("RANK", "PORT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return measure(args, *args.one)
    print(f"| {COLUMNS} |\n|{'---|' * len(COLUMNS.split('|'))}")
    settings = [f"--{name}={getattr(args, name)}" for name in ("layers", "segment", "grad_cp", "repeat")]
    for generation in args.generations:
        for T in args.lengths:
            for ranks in args.ranks:
                command = [sys.executable, __file__, *settings, "--generations", generation, "--lengths", str(T)]
                together(ranks, [*command, "--ranks", str(ranks)])


def together(ranks, command):
    """Run the ranks of a line; the first prints it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    processes = [subprocess.Popen([*command, "--one", str(rank), port]) for rank in range(ranks)]
    if any([process.wait() for process in processes]):
        sys.exit("a rank failed")


def measure(args, rank, port):
    """Take the steps of one rank; rank 0 prints the line."""
    torch.set_num_threads(1)
    (generation,), (T,), (ranks,) = args.generations, args.lengths, args.ranks
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    family = family_named(generation)
    torch.manual_seed(0)
    config = family.new_dimensions(n_layer=args.layers, n_embd=64, vocab_size=VOCABULARY, head_size=32)
    model = family.build(config, bool(args.grad_cp))
    family.init_weights(model)
    inject(model, AdapterConfig(rank=16), family=family)
    step = step_of(rank, ranks, args)
    take(model, step, WARM)  # kernels are built and loaded
    before, spent, seconds = peak(), time.process_time(), []
    for _ in range(args.repeat):
        dist.barrier()
        start = time.perf_counter()
        loss = take(model, step, T)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    found = torch.tensor([time.process_time() - spent, loss], dtype=torch.float64)
    memory = torch.tensor((peak() - before) / 2**20)
    dist.all_reduce(found)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    if rank == 0:
        share = waiting(ranks, args.layers, -(-T // args.segment) if args.segment else in_flight(ranks, args.layers, T))
        cells = f"{T:,}", ranks, f"{min(seconds):.2f}", f"{found[0] / args.repeat:.2f}", f"{share:.1%}"
        print("|", " | ".join(map(str, (family.name, *cells, f"{memory:.0f}", f"{found[1]:.6f}"))), "|", flush=True)
    dist.destroy_process_group()


def step_of(rank, ranks, args):
    if ranks == 1:
        return Segments(args.segment) if args.segment else Whole()
    line = Line(rank, ranks, args.layers)
    return SharedSegments(args.segment, line, NextToken()) if args.segment else SharedRows(NextToken(), line)


def take(model, step, T):
    """Forward and backward of one random row -> this rank's part of the loss."""
    tokens = torch.randint(VOCABULARY, (1, T + 1), generator=torch.Generator().manual_seed(T))
    mask = torch.ones(1, T, dtype=torch.bool)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask, "counted": torch.arange(T)}
    loss = step.loss(model, batch | step.sent(batch, torch.device("cpu")), T)
    loss.backward()
    return loss.item()


def peak():
    """The largest resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
