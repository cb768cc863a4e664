"""Tokens a second of decoding on a GPU, of one sequence and of many, by this package's own `generate`.

    python benchmarks/gpu_decode.py x070 [--weights bf16 int8] [--sequences 1 64 256] [--shape 2048x7168x24]

A random model continues greedily from prompts of 8 tokens, which are read before the clock starts. One JSON object for
each kind of weights and number of sequences, with CUDA graphs and without. weights_gb_s is the rate at which the
weights are read, if each step reads them once.
"""

import sys
import time
from unittest.mock import patch

import torch
from common import Parser
from gpu_models import SHAPE, VOCABULARY, peak_gib, random_model, reset_peak, tell, wait, without_room

from rwkv_peft.inference import forward
from rwkv_peft.inference.decode import generate
from rwkv_peft.inference.settings import Sampling
from rwkv_peft.inference.weights import quantize_products, rounded

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


def measure(args, model, weights, sequences, graphs):
    """Print the result for one number of sequences, with CUDA graphs or without."""
    with patch.object(forward, "recordable", forward.recordable if graphs else lambda model: False):
        measured(args, model, weights, sequences, graphs)


def measured(args, model, weights, sequences, graphs):
    vocabulary = model.config.vocab_size
    prompts = torch.randint(1, vocabulary, (sequences, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    reset_peak(args.device)
    decode(model, prompts, 4, args.device)  # compiles, and warms up
    seconds = min(decode(model, prompts, args.tokens, args.device) for _ in range(args.rounds))
    read = [*model.parameters(), *(product.weight for product in rounded(model).values())]
    tell(
        generation=args.version,
        weights=weights,
        sequences=sequences,
        graphs=graphs,
        tokens_per_s=round(args.tokens * sequences / seconds, 1),
        ms_a_step=round(1e3 * seconds / args.tokens, 3),
        weights_gb_s=round(sum(x.nbytes for x in read) * args.tokens / 1e9 / seconds, 1),
        **peak_gib(args.device),
    )


QUICK = dict(
    version="x070",
    device="cpu",
    shape="64x96x2",
    vocab=64,
    tokens=2,
    sequences=(2,),
    rounds=1,
    weights=("bf16", "int8"),
)


def main(argv=None):
    parser = Parser(__doc__, **QUICK)
    parser.add_argument("version", choices=("x060", "x070"))
    parser.add_argument("--weights", nargs="+", default=("bf16", "int8"), choices=("bf16", "int8", "int4"))
    parser.add_argument("--sequences", type=int, nargs="+", default=(1, 64, 256))
    parser.add_argument("--tokens", type=int, default=64, help="of each sequence in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", default=SHAPE, help="channels, feed-forward channels, layers")
    parser.add_argument("--vocab", type=int, default=VOCABULARY)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(argv)
    return max(measure_weights(args, weights) for weights in args.weights)


def measure_weights(args, weights):
    """Print the results for one kind of weights -> an exit code."""
    family, config, tensors = random_model(args.version, args.shape, args.vocab, args.device)
    model = family.load(tensors, config).requires_grad_(False).eval()
    if weights != "bf16":
        quantize_products(model, weights, lambda text: None)
        model.to(args.device)
    return max(
        without_room(
            lambda n=n, g=g: measure(args, model, weights, n, g),
            generation=args.version,
            weights=weights,
            sequences=n,
            graphs=g,
        )
        for n in args.sequences
        for g in (True, False)
    )


if __name__ == "__main__":
    sys.exit(main())
