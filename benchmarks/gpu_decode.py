"""Tokens a second of decoding on a GPU, of one sequence and of many, by this package's own `generate`.

    python benchmarks/gpu_decode.py x070 [--sequences 1 64 256] [--tokens 64] [--shape 2048x7168x24]

A random model continues greedily from prompts of 8 tokens, which are read before the clock starts. One JSON object for
each number of sequences, with CUDA graphs and without. weights_gb_s is the rate at which the weights are read, if each
step reads them once.
"""

import argparse
import sys
import time
from unittest.mock import patch

import torch
from gpu_models import SHAPE, VOCABULARY, peak_gib, random_model, reset_peak, tell, wait, without_room

from rwkv_peft.generate import Sampling, generate, replay

PROMPT = 8


def decode(model, prompts, tokens, device):
    """The seconds for so many more tokens of each sequence."""
    steps = generate(model, prompts, Sampling(temperature=0), tokens + 1, batch=len(prompts))
    for _ in prompts:  # the first token of each comes of reading its prompt
        next(steps)
    wait(device)
    start = time.perf_counter()
    drawn = sum(1 for _ in steps)
    assert drawn == tokens * len(prompts), f"{drawn} tokens were drawn"
    return time.perf_counter() - start


def measure(args, model, sequences, graphs):
    """Print the result for one number of sequences, with CUDA graphs or without."""
    with patch.object(replay, "recordable", replay.recordable if graphs else lambda model: False):
        measured(args, model, sequences, graphs)


def measured(args, model, sequences, graphs):
    vocabulary = model.config.vocab_size
    prompts = torch.randint(1, vocabulary, (sequences, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    reset_peak(args.device)
    decode(model, prompts, 4, args.device)  # compiles, and warms up
    seconds = min(decode(model, prompts, args.tokens, args.device) for _ in range(args.rounds))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    tell(
        generation=args.version,
        sequences=sequences,
        graphs=graphs,
        tokens_per_s=round(args.tokens * sequences / seconds, 1),
        ms_a_step=round(1e3 * seconds / args.tokens, 3),
        weights_gb_s=round(weights * args.tokens / 1e9 / seconds, 1),
        **peak_gib(args.device),
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", choices=("x060", "x070"))
    parser.add_argument("--sequences", type=int, nargs="+", default=(1, 64, 256))
    parser.add_argument("--tokens", type=int, default=64, help="of each sequence in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", default=SHAPE, help="channels, feed-forward channels, layers")
    parser.add_argument("--vocab", type=int, default=VOCABULARY)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(argv)
    family, config, weights = random_model(args.version, args.shape, args.vocab, args.device)
    model = family.load(weights, config).requires_grad_(False).eval()
    return max(
        without_room(lambda n=n, g=g: measure(args, model, n, g), generation=args.version, sequences=n, graphs=g)
        for n in args.sequences
        for g in (True, False)
    )


if __name__ == "__main__":
    sys.exit(main())
