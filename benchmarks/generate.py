"""Tokens a second of decoding, beside the `rwkv` package with the same model.

    python benchmarks/generate.py [--layers 12] [--channels 768] [--threads 1 2] [--batches 1 16] [--precision fp32]

Makes a random model in a temporary folder. Both continue greedily, from prompts of 8 tokens, each number of threads in
a process of its own; the two take turns, and the best of the rounds counts, because other work on the machine can only
slow one down. The package has no batches: it advances the sequences one after the other. For one thread the tokens a
second of processor time stand beside those of the clock.
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROMPT = 8


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 16))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each sequence in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help=argparse.SUPPRESS)  # set where this program runs itself
    args = parser.parse_args()
    if args.model:
        return measure(args)
    print(
        "| threads | sequences | clock | rwkv_peft, tokens/s | rwkv, tokens/s | ratio |\n|---|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        make_model(path, args.layers, args.channels)
        for threads in args.threads:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), "RWKV_V7_ON": "0"}
            command = [
                sys.executable,
                __file__,
                "--model",
                str(path),
                "--threads",
                str(threads),
                "--precision",
                args.precision,
                "--tokens",
                str(args.tokens),
                "--rounds",
                str(args.rounds),
                "--batches",
                *map(str, args.batches),
            ]
            subprocess.run(command, env=environment, check=True)


def make_model(path, layers, channels):
    """A random World-vocabulary model of the official widths, float32."""
    import torch

    from rwkv_peft.files.base import save_model
    from rwkv_peft.models.rwkv6.keys import RWKV6Config, shapes

    torch.manual_seed(0)
    config = RWKV6Config(
        n_layer=layers, n_embd=channels, vocab_size=65536, dim_att=channels, dim_ffn=int(channels * 3.5) // 32 * 32
    )
    save_model(
        path,
        {
            key: torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape)
            for key, shape in shapes(config).items()
        },
    )


def measure(args):
    """Print the rows of the table for one number of threads."""
    import torch

    from rwkv_peft.generate import load_model

    torch.set_num_threads(args.threads[0])
    ours, _ = load_model(args.model, precision=args.precision)
    with contextlib.redirect_stdout(io.StringIO()):
        from rwkv.model import RWKV

        theirs = RWKV(model=args.model.removesuffix(".pth"), strategy=f"cpu {args.precision}", verbose=False)
    for batch in args.batches:
        prompts = torch.randint(1, 60000, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
        tokens = args.tokens if batch == 1 else max(args.tokens // 4, 2)
        rates = [[], []]
        for _ in range(args.rounds + 1):  # the first warms up
            rates[0].append(our_rates(ours, prompts, tokens))
            rates[1].append(their_rates(theirs, prompts, tokens))
        for clock, name in enumerate(("wall", "processor")[: 2 if args.threads[0] == 1 else 1]):
            mine, other = (max(rate[clock] for rate in side[1:]) for side in rates)
            print(
                f"| {args.threads[0]} | {batch} | {name} | {mine:.1f} | {other:.1f} | {mine / other:.2f} |", flush=True
            )


def our_rates(model, prompts, tokens):
    """Tokens a second by the wall clock and by processor time; prompts are read before the clocks start."""
    from rwkv_peft.generate import Sampling, generate

    steps = generate(model, prompts, Sampling(temperature=0), tokens + 1)
    for _ in prompts:  # the first token of each comes of reading its prompt
        next(steps)
    began = time.perf_counter(), time.process_time()
    drawn = sum(1 for _ in steps)
    return drawn / (time.perf_counter() - began[0]), drawn / (time.process_time() - began[1])


def their_rates(model, prompts, tokens):
    """The same for the package."""
    import torch

    with torch.inference_mode():
        rows = [model.forward(prompt, None) for prompt in prompts]
        began = time.perf_counter(), time.process_time()
        for _ in range(tokens):
            rows = [model.forward([int(logits.argmax())], state) for logits, state in rows]
        drawn = tokens * len(prompts)
        return drawn / (time.perf_counter() - began[0]), drawn / (time.process_time() - began[1])


if __name__ == "__main__":
    main()
