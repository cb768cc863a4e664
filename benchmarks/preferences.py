"""The time and memory of a step on pairs of answers: beside a plain step over the same rows, and with the prompt
computed once for both.

    python benchmarks/preferences.py [--methods bat-in bone lora] [--prompts 128] [--rounds 7]
    python benchmarks/preferences.py --methods bat-in --rank 16 --shape 256x896x4 --vocab 4096 --prompts 64 1024 4096

Each answer has --tokens tokens of its own, which count. Two answers are a pair, which DPO learns from; more take the
plain loss. Forward and backward on one thread, in turns in one process: medians of processor time, and the medians of
the ratios to pairs on whole rows within a round. Memory is what autograd keeps for backward.
"""

import torch
from common import VERSIONS, Parser, adapter_of, head, in_turns, median_ms, new_model, ratio, row, saved_bytes

from rwkv_peft.data.samples import collate
from rwkv_peft.objectives.dpo import DPO
from rwkv_peft.training.step.steps import NEXT_TOKEN, Whole

QUICK = dict(generations=("x070",), methods=("bat-in",), shape="64x96x2", vocab=64, rank=8, prompts=(16,), rounds=1)


def main():
    parser = Parser(__doc__, **QUICK)
    parser.add_argument("--generations", nargs="+", default=VERSIONS)
    parser.add_argument("--methods", nargs="+", default=("bat-in", "bone", "lora"))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--shape", default="768x2688x4", help="channels, feed-forward channels, layers")
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--prompts", nargs="+", type=int, default=(128,), help="tokens of a prompt")
    parser.add_argument("--answers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    times = "plain step, ms", "pairs, ms", "once, ms", "pairs / plain", "pairs / once"
    head("model", "method", "prompt", *times, "pairs, MiB", "once, MiB")
    channels, ffn, layers = map(int, args.shape.split("x"))
    for version in args.generations:
        for method in args.methods:
            adapter = adapter_of(method, args.rank)
            family, model = new_model(version, layers, channels, args.vocab, adapter, dim_ffn=ffn)
            for length in args.prompts:
                row(family.name, method, f"{length:,}", *measure(model, length, args))


def measure(model, length, args):
    """The numbers of a line."""
    prompt = torch.randint(args.vocab, (length,))
    mask = torch.arange(length + args.tokens - 1) >= length - 1
    answers = torch.randint(args.vocab, (args.answers, args.tokens))
    batch = collate([[(torch.cat([prompt, answer]), mask) for answer in answers]])
    objective = DPO() if args.answers == 2 else NEXT_TOKEN
    once = Whole(objective, group=args.answers)
    shared = once.prepare_inputs(batch, torch.device("cpu"))
    cases = {"plain": (Whole(), batch), "pairs": (Whole(objective), batch), "once": (once, shared)}
    losses = {name: lambda step=step, rows=rows: step.loss(model, rows, 1) for name, (step, rows) in cases.items()}
    times = in_turns({name: lambda loss=loss: loss().backward() for name, loss in losses.items()}, args.rounds)
    kept = [saved_bytes(losses[name], model.parameters())[0] / 2**20 for name in ("pairs", "once")]
    ratios = ratio(times["pairs"], times["plain"]), ratio(times["pairs"], times["once"])
    medians = (f"{median_ms(taken):.0f}" for taken in times.values())
    return [*medians, *(f"{number:.2f}" for number in ratios), *(f"{size:.1f}" for size in kept)]


if __name__ == "__main__":
    main()
