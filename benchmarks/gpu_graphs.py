"""A training step whose blocks are replayed as CUDA graphs (train.py's --cuda_graphs) beside the same step without.

    python benchmarks/gpu_graphs.py [--generations x060 x070] [--methods bat-in lora] [--rows plain packed]

Both begin with the same adapter and see the same micro batches, two in each step, whose gradients are added up; then
steps of one micro batch are timed. A packed row holds one to five documents, a different number in each micro batch.
One JSON object in each line: the median milliseconds of both; if the losses of both have the same bits, and their
largest difference; and the peak of memory with graphs. Exit code 1 if they differ by more than 1 %: under recording a
library may choose other kernels, but not other numbers.
"""

import argparse
import itertools
import json
import statistics
import sys
import time

import gpu_budget as budget
import step as steps
import torch

from rwkv_peft.fused import Setting, fuse
from rwkv_peft.models import FAMILIES, family_named
from rwkv_peft.ops.recurrence.checks import vouch
from rwkv_peft.training.step.graphs import Form, Graphed
from rwkv_peft.training.step.steps import Whole, straight

STEPS, CLOSE = 4, 0.01  # optimizer steps whose losses are compared; how near these have to be
FORMS = {"plain": (0,), "packed": (5, 4, 2, 1)}  # the numbers of sequences that are recorded of a row


def micro_batch(seed, rows, args, device):
    """A batch of args.tokens tokens; rows "plain" or "packed"."""
    torch.manual_seed(seed)
    tokens = args.tokens
    row = torch.randint(args.vocab, (1, tokens + 1), device=device)
    batch = {"tokens": row[:, :-1], "targets": row[:, 1:], "counted": torch.arange(tokens, device=device)}
    if rows == "packed":
        documents = 1 + 3 * seed % FORMS[rows][0]
        bounds = torch.arange(documents + 1) * tokens // documents
        batch["cu_seqlens"] = bounds.to(device)
        vouch(batch["cu_seqlens"], bounds, tokens)
    return batch


def made(family, config, weights, method, rank):
    """(a model with an adapter that is not zero, the optimizer of its parameters)."""
    torch.manual_seed(0)
    model = family.load(weights, config)
    budget.adapt(model, method, rank, family)
    fuse(model, Setting(model.emb.weight.device))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=1e-3)
    return model, torch.optim.AdamW(trained, lr=1e-3, fused=True)


def train(step, model, optimizer, batches):
    """Take one optimizer step over micro batches -> their losses."""
    losses = []
    for batch in batches:
        loss = step.loss(model, batch, batch["targets"].numel() * len(batches))
        loss.backward()
        losses.append(loss.detach())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses


def run(step, model, optimizer, rows, args, device):
    """(the losses of STEPS steps of two micro batches, the median milliseconds of a step of one)."""
    losses, times = [], []
    for number in range(STEPS):
        pair = [micro_batch(2 * number + i, rows, args, device) for i in (0, 1)]
        losses += train(step, model, optimizer, pair)
    batch = micro_batch(1, rows, args, device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(args.rounds):
        wait()
        start = time.perf_counter()
        train(step, model, optimizer, [batch])
        wait()
        times.append(time.perf_counter() - start)
    return torch.stack(losses).float(), 1e3 * statistics.median(times)


def compare(version, method, rows, args, device):
    """(the JSON object of a generation, a method and a kind of rows, True if the losses are close)."""
    family = family_named(version)
    channels, ffn, layers = map(int, args.shape.split("x"))
    config = family.new_dimensions(layers, channels, args.vocab, dim_ffn=ffn)
    weights = steps.random_weights(family, config, {"device": device, "dtype": torch.bfloat16})
    graphed = Graphed([Form(args.tokens, sequences) for sequences in FORMS[rows]])
    found = {}
    for name, way in (("eager", straight), ("graphs", graphed)):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found[name] = run(Whole(way=way), *made(family, config, weights, method, args.rank), rows, args, device)
    (eager, eager_ms), (graphs, graphs_ms) = found.values()
    difference = ((eager - graphs).abs() / eager.abs()).max().item()
    entry = {"generation": family.name, "method": method, "rows": rows, "shape": args.shape, "tokens": args.tokens}
    entry |= {"eager_ms": round(eager_ms, 3), "graphs_ms": round(graphs_ms, 3)}
    entry |= {"same_bits": torch.equal(eager, graphs), "difference": difference}
    if device == "cuda":
        entry["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return entry, difference <= CLOSE


def main(argv=None, device="cuda"):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", nargs="+", default=[family.version for family in FAMILIES])
    parser.add_argument("--methods", nargs="+", default=("bat-in",), choices=budget.METHODS[1:])
    parser.add_argument("--rows", nargs="+", default=tuple(FORMS), choices=tuple(FORMS))
    parser.add_argument("--shape", default="2048x7168x24", help="channels, feed-forward channels, layers")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args(argv)
    failed = False
    for version, method, rows in itertools.product(args.generations, args.methods, args.rows):
        entry, close = compare(version, method, rows, args, device)
        print(json.dumps(entry), flush=True)
        failed |= not close
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
