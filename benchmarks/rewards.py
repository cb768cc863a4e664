"""The speed at which a model in training draws answers, adapters on, beside `generate` on the merged one.

    python benchmarks/rewards.py [--generations x060 x070] [--methods bat-in bone lora] [--rounds 5]

Answers of equal length to prompts of equal length, several to each; the merged model has no adapter, reads each prompt
for each answer and tells no probabilities, as `generate` does. Processor time of one thread, both in turns in one
process: medians, and the median of the ratios within a round, for answers alone and with the reading of prompts.
"""

import statistics
import time

import torch
from common import VERSIONS, Parser, adapter_of, head, new_model, row

from rwkv_peft.inference.decode import generate
from rwkv_peft.inference.settings import Sampling


def main():
    parser = Parser(
        __doc__,
        generations=("x070",),
        methods=("bat-in",),
        shape="64x96x2",
        vocab=64,
        length=4,
        answers=2,
        tokens=2,
        rounds=1,
    )
    parser.add_argument("--generations", nargs="+", default=VERSIONS)
    parser.add_argument("--methods", nargs="+", default=("bat-in", "bone", "lora"))
    parser.add_argument("--shape", default="768x2688x4", help="channels, feed-forward channels, layers")
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    head("model", "method", "merged, tokens/s", "adapted, tokens/s", "ratio", "with prompts")
    for version in args.generations:
        for method in args.methods:
            row(*measure(version, method, args))


def measure(version, method, args):
    """The line of a generation and a method."""
    models, (channels, ffn, layers) = [], map(int, args.shape.split("x"))
    for adapter in (None, adapter_of(method, min(64, channels // 2))):
        family, model = new_model(version, layers, channels, args.vocab, adapter, dim_ffn=ffn)
        models.append(model.eval())
    prompts = [torch.randint(1, args.vocab, (args.length,)).tolist() for _ in range(args.prompts)]
    times = []
    for _ in range(args.rounds + 1):  # the first builds kernels
        times.append([seconds(model, prompts, args, adapts) for adapts, model in enumerate(models)])
    drawn = args.prompts * args.answers * args.tokens
    rates = [[drawn / answers for _, answers in column] for column in zip(*times[1:])]
    ratio = statistics.median(ours / theirs for theirs, ours in zip(*rates))
    whole = statistics.median(sum(theirs) / sum(ours) for theirs, ours in times[1:])
    merged, adapted = map(statistics.median, rates)
    return family.name, method, f"{merged:.0f}", f"{adapted:.0f}", f"{ratio:.2f}", f"{whole:.2f}"


def seconds(model, prompts, args, trains):
    """(Seconds of reading the prompts, seconds of drawing the answers)."""
    copies = [prompt if trains else list(prompt) for prompt in prompts for _ in range(args.answers)]
    steps = generate(model, copies, Sampling(top_p=1.0, measured=trains), args.tokens + 1, batch=len(copies))
    began = time.process_time()
    for _ in copies:  # the first token of each comes of reading its prompt
        next(steps)
    read = time.process_time()
    for _ in steps:
        pass
    return read - began, time.process_time() - read


if __name__ == "__main__":
    main()
