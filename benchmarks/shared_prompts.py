"""The time and memory of a step that computes a prompt once for all of its answers, beside those on whole rows.

    python benchmarks/shared_prompts.py [--prompts 64 256 1024 4096] [--answers 2] [--tokens 64] [--shape 256x896x4]

Each answer has so many tokens of its own. Two answers are a pair, which DPO learns from; more take the plain loss.
Forward and backward, both in turns in one process: medians of CPU time, and the median of the ratios within a round.
Memory is what autograd keeps for backward.
"""

import argparse
import statistics
import time

import gpu_budget as budget
import torch

from rwkv_peft.data.collate import collate
from rwkv_peft.models import family_named
from rwkv_peft.objectives.dpo import DPO
from rwkv_peft.training.step.steps import NEXT_TOKEN, Whole


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", nargs="+", default=("x060", "x070"))
    parser.add_argument("--method", default="bat-in", choices=budget.METHODS[1:])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shape", default="256x896x4", help="channels, feed-forward channels, layers")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--prompts", nargs="+", type=int, default=(16, 64, 256, 1024, 4096), help="tokens of a prompt")
    parser.add_argument("--answers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"| model | prompt | whole, ms | once, ms | ratio | whole, MiB | once, MiB |\n|{'---|' * 7}")
    for version in args.generations:
        family = family_named(version)
        torch.manual_seed(0)
        channels, ffn, layers = map(int, args.shape.split("x"))
        model = family.build(family.new_dimensions(layers, channels, args.vocab, dim_ffn=ffn))
        family.init_weights(model)
        budget.adapt(model, args.method, args.rank, family)
        for length in args.prompts:
            print(f"| {family.name} | {length:,} | {measure(model, length, args)} |", flush=True)


def measure(model, length, args):
    """The numbers of a line."""
    prompt = torch.randint(args.vocab, (length,))
    mask = torch.arange(length + args.tokens - 1) >= length - 1
    answers = torch.randint(args.vocab, (args.answers, args.tokens))
    batch = collate([[(torch.cat([prompt, answer]), mask) for answer in answers]])
    objective = DPO() if args.answers == 2 else NEXT_TOKEN
    whole, once = Whole(objective), Whole(objective, group=args.answers)
    cases = ((whole, batch), (once, batch | once.sent(batch, torch.device("cpu"))))
    kept = [saved(model, *case) for case in cases]  # which builds kernels
    times = [[seconds(model, *case) for case in cases] for _ in range(args.rounds)]
    medians = (1e3 * statistics.median(column) for column in zip(*times))
    ratio = statistics.median(first / second for first, second in times)
    return " | ".join(["{:.0f} | {:.0f}".format(*medians), f"{ratio:.2f}", "{:.1f} | {:.1f}".format(*kept)])


def seconds(model, step, batch):
    """The CPU seconds of one forward and backward: on one thread, they do not depend on what else the machine does."""
    start = time.process_time()
    step.loss(model, batch, 1).backward()
    return time.process_time() - start


def saved(model, step, batch):
    """The MiB that autograd keeps for backward, parameters not counted."""
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step.loss(model, batch, 1)
    for parameter in model.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    loss.backward()
    return sum(sizes.values()) / 2**20


if __name__ == "__main__":
    main()
