"""Trains the demo's models on a few chats of the demo, and counts the sampled answers that stop and that are right.

    python benchmarks/few_chats.py [--rows 20 100 1000] [--methods bat-in states] [--times 1] [--steps 400]
                                   [--top_p 0.3] [--seeds 3] [--versions x060 x070]

The chats are those of `python demo/task.py chats`. rp.train in one thread, 8 rows a step, in float32, for the epochs
that make --steps, at multiples of --lr_init auto. ASKED rows of the training data and as many others are answered at
temperature 1. An answer has the manner if it begins as `Aye! 5 black grapes, all of Dan.` does, with whatever facts.
It is right if it is the row's letter by letter, and stops. Sums over seeds.
docs/guides/learning-rates.md and states.md have the last tables.
"""

import re
import sys

import torch
from common import DEMO, ROOT, Parser, head, row

import rwkv_peft as rp
from rwkv_peft.config.train import AIM
from rwkv_peft.models import family_named
from rwkv_peft.training.rates import automatic_rate

sys.path.insert(0, str(ROOT / "demo"))
from task import documents  # noqa: E402

ASKED, ROWS, LONGEST = 20, 8, 80  # rows that are asked of each kind, rows of a step, tokens of an answer
MANNER = re.compile(r"Aye! \d \w+ \w+, all of \w+\.")


def answered(model, rows, seed, top_p):
    """(how many answers stop, have the manner, are right)."""
    prompts = [{"messages": row["messages"][:1]} for row in rows]
    answers = model.generate(prompts, LONGEST, details=True, seed=seed, top_p=top_p)
    ended = [answer.end != "length" for answer in answers]
    right = [
        end and answer.text.strip() == row["messages"][1]["content"] for end, answer, row in zip(ended, answers, rows)
    ]
    manner = [bool(MANNER.match(answer.text.strip())) for answer in answers]
    return torch.tensor([sum(ended), sum(manner), sum(right)])


def measured(args, version, method, number, times, seed):
    """(the rate, the steps, the last loss, what is answered of training rows, and of others)."""
    torch.manual_seed(seed)
    model = rp.load(str(DEMO[version]), precision="fp32", device="cpu")
    if method == "states":
        rp.add_adapter(model, method="none", train_parts=["state"])
    else:
        rp.add_adapter(model, rank=64, mode=method)
    rate = automatic_rate(model.adapter, model.network.config.n_embd).value * times
    rows, others = (list(documents("chats", many, first)) for many, first in ((number, seed), (ASKED, 1000 + seed)))
    epochs = -(-args.steps // -(-number // ROWS))
    settings = {"ctx_len": 256, "micro_bsz": ROWS, "random_seed": seed, "progress": False, "epoch_count": epochs}
    history = rp.train(model, rows, lr_init=rate, lr_final=rate / 10, **settings)
    both = [answered(model, part, seed, args.top_p) for part in (rows[:ASKED], others)]
    return rate, len(history), history[-1]["loss"], *both


def main(argv):
    parser = Parser(__doc__, rows=[20], steps=2, seeds=1, methods=["bat-in"], versions=["x070"])
    parser.add_argument("--rows", type=int, nargs="+", default=[20, 100, 1000])
    parser.add_argument("--methods", nargs="+", default=["bat-in", "states"])
    parser.add_argument("--times", type=float, nargs="+", default=[1.0])
    parser.add_argument("--steps", type=int, default=AIM)
    parser.add_argument("--top_p", type=float, default=rp.Sampling.top_p)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--versions", nargs="+", default=list(DEMO), choices=list(DEMO))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    head("model", "method", "chats", "rate", "steps", "loss", "training rows: stop, manner, right", "others", "of")
    for version in args.versions:
        for method in args.methods:
            for number in args.rows:
                for times in args.times:
                    runs = [measured(args, version, method, number, times, 1 + seed) for seed in range(args.seeds)]
                    rate, steps, *_ = runs[0]
                    loss = sum(run[2] for run in runs) / len(runs)
                    counts = [", ".join(str(int(n)) for n in sum(run[part] for run in runs)) for part in (3, 4)]
                    row(
                        family_named(version).name,
                        method,
                        number,
                        f"{rate:.2g}",
                        steps,
                        f"{loss:.3f}",
                        *counts,
                        ASKED * len(runs),
                    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
