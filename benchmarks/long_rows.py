"""Memory and time of a training step on one long row: whole, in segments with the states carried over, or shared by
ranks.

    python benchmarks/long_rows.py --segments 0 512 --lengths 2048 16384 65536 --layers 2 --whole 16384
    python benchmarks/long_rows.py --ranks 1 2 --lengths 4096 16384 --repeat 2

A tiny model with Bone's bat-in on every linear layer, float32, one thread a rank. Each line starts its ranks, which
meet over gloo. Memory is the rise of the resident peak of the rank with the largest; processor time is that of all
ranks. One row takes --repeat steps, of which the fastest counts. Rows up to --whole tokens are also computed whole
(--segments 0).
"""

import argparse
import socket
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from common import VERSIONS, Parser, adapter_of, head, new_model, resident_peak, row

from rwkv_peft.objectives.next_token import NextToken
from rwkv_peft.training.step.context_parallel import Line, SharedRows, in_flight, waiting
from rwkv_peft.training.step.segments import Segments
from rwkv_peft.training.step.steps import Whole

VOCABULARY, WARM = 257, 256
QUICK = dict(generations=("x070",), ranks=(1, 2), lengths=(512,), segments=(0, 128), layers=2, repeat=1)


def main():
    parser = Parser(__doc__, **QUICK)
    parser.add_argument("--generations", nargs="+", default=VERSIONS)
    parser.add_argument("--ranks", nargs="+", type=int, default=(1,))
    parser.add_argument("--lengths", nargs="+", type=int, default=(4096, 16384, 65536))
    parser.add_argument("--segments", nargs="+", type=int, default=(0,), help="tokens of a segment, 0: whole rows")
    parser.add_argument("--whole", type=int, default=1 << 20, help="longest row that is also computed whole")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--grad_cp", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--one", nargs=2, type=int, metavar=("RANK", "PORT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return measure(args, *args.one)
    times = "step, s", "processor time, s", "us a token", "waiting by count"
    head("model", "T", "segments of", "ranks", *times, "memory of a rank, MiB", "loss")
    settings = [f"--{name}={getattr(args, name)}" for name in ("layers", "grad_cp", "repeat")]
    for generation in args.generations:
        for T in args.lengths:
            for segment in args.segments if args.whole >= T else filter(None, args.segments):
                for ranks in args.ranks:
                    case = f"--generations {generation} --lengths {T} --segments {segment} --ranks {ranks}".split()
                    together(ranks, [sys.executable, __file__, *settings, *case])


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
    (generation,), (T,), (ranks,), (segment,) = args.generations, args.lengths, args.ranks, args.segments
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    family, model = new_model(generation, args.layers, 64, VOCABULARY, adapter_of("bat-in", 16), head_size=32)
    model.grad_checkpoint = bool(args.grad_cp)
    step = step_of(rank, ranks, segment, args.layers)
    take(model, step, WARM)  # kernels are built and loaded
    before, spent, seconds = resident_peak(), time.process_time(), []
    for _ in range(args.repeat):
        dist.barrier()
        start = time.perf_counter()
        loss = take(model, step, T)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    found = torch.tensor([time.process_time() - spent, loss], dtype=torch.float64)
    memory = torch.tensor((resident_peak() - before) / 2**20)
    dist.all_reduce(found)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    if rank == 0:
        share = waiting(ranks, args.layers, -(-T // segment) if segment else in_flight(ranks, args.layers, T))
        fastest = min(seconds)
        cells = f"{fastest:.2f}", f"{found[0] / args.repeat:.2f}", f"{1e6 * fastest / T:.0f}", f"{share:.1%}"
        row(family.name, f"{T:,}", segment or "whole", ranks, *cells, f"{memory:.0f}", f"{found[1]:.6f}")
    dist.destroy_process_group()


def step_of(rank, ranks, segment, layers):
    if ranks == 1:
        return Segments(segment) if segment else Whole()
    line = Line(rank, ranks, layers)
    return SharedRows(NextToken(), line, chunk=segment)


def take(model, step, T):
    """Forward and backward of one random row -> this rank's part of the loss."""
    tokens = torch.randint(VOCABULARY, (1, T + 1), generator=torch.Generator().manual_seed(T))
    mask = torch.ones(1, T, dtype=torch.bool)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask, "counted": torch.arange(T)}
    loss = step.loss(model, step.prepare_inputs(batch, torch.device("cpu")), T)
    loss.backward()
    return loss.item()


if __name__ == "__main__":
    main()
