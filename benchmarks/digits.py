"""Teaches a new model to turn digits around by rewards alone: it knows nothing, and sees no answer but its own.

    python benchmarks/digits.py [--digits 3] [--seeds 1 2 3] [--steps 400] [--output out/digits] [-- FLAGS OF train.py]

Prompts are numbers of one to so many digits; the answer to 123 is 321. An answer of the right length earns the share
of its places that are right, so that the model finds single digits first, which are easy, and goes on from there. The
vocabulary is ten digits, the two tokens that lay out a prompt, and the end. The share of whole answers that are right
is measured along with a weight of 0. A tenth of the longest numbers is held out; after the last step one answer is
drawn to each of these, too.

Writes curves.png and a line of each run to the folder of --output.
"""

import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from common import Parser, head, row, split
from common import train as train_in

TOKENS = (*"0123456789", "User: ", "\n\nAssistant:")
REWARDS = ("places", "exact")
MODEL = ("--my_testing", "x070", "--n_layer", "2", "--n_embd", "64", "--vocab_size", str(len(TOKENS) + 1))
TRAIN = ("--train_type", "finetune", "--ctx_len", "16")
DRAWN = ("--micro_bsz", "64", "--num_generations", "16", "--draw_batch", "1024")
RATE = ("--lr_init", "1e-3", "--lr_final", "1e-4", "--warmup_steps", "10", "--weight_decay", "0")


def main(argv):
    own, more = split(argv)
    parser = Parser(__doc__, digits=2, seeds=(1,), steps=1, output=None)
    parser.add_argument("--digits", type=int, default=3, help="the most of a number, 2 at least (default 3)")
    parser.add_argument("--seeds", type=int, nargs="+", default=(1, 2, 3))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", default="out/digits", metavar="DIR")
    args = parser.parse_args(own)
    folder = Path(args.output or tempfile.mkdtemp()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.txt").write_text("".join(f"{n} {text!r} {len(text)}\n" for n, text in enumerate(TOKENS, 1)))
    head("seed", "places", "whole answers", "held-out numbers, places", "time")
    runs = {seed: train(folder, seed, args, more) for seed in args.seeds}
    draw(runs, folder / "curves.png")


def places(completions, query, **fields):
    """The share of places at which an answer of the right length is its number turned around."""
    return [
        sum(map(str.__eq__, text, reversed(number))) / len(number) * (len(text) == len(number))
        for text, number in zip(completions, query)
    ]


def exact(completions, query, **fields):
    return [float(text == number[::-1]) for text, number in zip(completions, query)]


def train(folder, seed, args, more):
    """Train a new model -> its metrics, a dict of each step."""
    generator = random.Random(seed)
    numbers = [f"{n:0{size}}" for size in range(1, args.digits + 1) for n in range(10**size)]
    held = set(generator.sample([number for number in numbers if len(number) == args.digits], 10 ** (args.digits - 1)))
    shown = [number for number in numbers if number not in held]
    of_size = [[number for number in shown if len(number) == size] for size in range(1, args.digits + 1)]
    rows = [generator.choice(generator.choice(of_size)) for _ in range(4096)]
    for name, part in (("train", rows), ("held-out", sorted(held))):
        text = "".join(json.dumps({"query": number}) + "\n" for number in part)
        (folder / f"{name}-{seed}.jsonl").write_text(text)
    run = folder / f"seed-{seed}"
    data = ("--data_file", folder / f"train-{seed}.jsonl", "--val_data", folder / f"held-out-{seed}.jsonl")
    kind = ("--data_type", "prompts", "--tokenizer", folder / "tokens.txt", "--max_completion_length", args.digits + 1)
    judged = ("--reward", *(f"{Path(__file__).resolve()}:{name}" for name in REWARDS), "--reward_weights", 1, 0)
    length = ("--epoch_steps", args.steps, "--epoch_count", 1, "--random_seed", seed)
    shutil.rmtree(run, ignore_errors=True)  # of an earlier call
    began = time.perf_counter()
    lines = train_in(run, *data, *kind, *judged, *length, *MODEL, *TRAIN, *DRAWN, *RATE, *more)
    steps = [line for line in lines if "reward/exact" in line]
    last = [sum(step[f"reward/{name}"] for step in steps[-25:]) / len(steps[-25:]) for name in REWARDS]
    held_out, seconds = steps[-1]["val_reward"], time.perf_counter() - began
    row(seed, f"{last[0]:.3f}", f"{last[1]:.3f}", f"{held_out:.3f}", f"{seconds:.0f} s")
    return steps


def draw(runs, path):
    """Draw the share of whole answers that are right, a mean over 20 steps, of each run by its seed."""
    from matplotlib.figure import Figure

    figure = Figure((7, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="drawn answers that are right", ylim=(0, 1))
    for seed, steps in runs.items():
        shares = [step["reward/exact"] for step in steps]
        means = [sum(shares[max(0, n - 19) : n + 1]) / min(20, n + 1) for n in range(len(shares))]
        axes.plot([step["step"] + 1 for step in steps], means, label=f"seed {seed}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
