"""Trains on a few rows by each method, at multiples of --lr_init auto: the loss of held-out rows, and of older text.

    python benchmarks/few_rows.py [--rows 30 200] [--kind chats] [--methods bat-in lora:rank=8] [--times 0.3 1 3]
                                  [--model PTH] [--new] [--seed 1]

The chats are in a manner that the demo's bases do not know: "Tom has 6 golden maps. Who has something?" is answered
"Aye, Tom, captain!". The texts are stories whose bytes all count, while the bases learned their answers alone. A bare
loop in one thread, as a run without further flags would train: a row a step, one epoch of texts, and as many of chats
as make 200 steps; a rate that falls to a tenth along a cosine; clipping to a norm of 1. The second loss of
a column is that of answers that the bases were trained on: what the run forgot. --new draws the weights anew.
docs/guides/learning-rates.md has the last tables.
"""

import json
import random
import sys
from pathlib import Path

import torch
from common import DEMO, ROOT, Parser, head, row

import rwkv_peft as rp
from rwkv_peft.adapters.inject import inject
from rwkv_peft.api.adapters import config_of
from rwkv_peft.cli.names import NONE
from rwkv_peft.config import AdapterConfig
from rwkv_peft.config.adapter import BONE
from rwkv_peft.config.train import learning_rate
from rwkv_peft.data.samples import collate
from rwkv_peft.training.model import estimate_gradients
from rwkv_peft.training.rates import automatic_rate
from rwkv_peft.training.step.steps import Whole

sys.path.insert(0, str(ROOT / "demo"))
from task import COLORS, COUNTS, ITEMS, NAMES, documents  # noqa: E402

HELD_OUT = 30


def questions(number, seed):
    """Facts with a question each, as a prompt, and what answers it."""
    draw = random.Random(seed)
    for _ in range(number):
        who, count, color, item = (draw.choice(words) for words in (NAMES, COUNTS, COLORS, ITEMS))
        asked, told = draw.choice(
            [("Who has something?", who), ("How many?", count), ("What is there?", f"{color} {item}")]
        )
        yield f"User: {who} has {count} {color} {item}. {asked}\n\nAssistant:", told


def chats(number, seed):
    return [(prompt, f" Aye, {told}, captain!\n\nUser:") for prompt, told in questions(number, seed)]


def texts(number, seed):
    return [("", document["text"]) for document in documents("base", number, seed)]


def answers(number, seed):
    """The last answers of the texts that the bases were trained on, behind the rest of these."""
    split = (document["text"].rpartition("A:") for document in documents("base", number, seed))
    return [(before + sign, answer) for before, sign, answer in split]


STEPS = 200  # of a run
KINDS = {"chats": (chats, STEPS), "texts": (texts, 1)}


def laid(rows, tokenizer):
    """(prompt, answer) -> (tokens (T + 1,), which of T targets count: the answer's), behind token 0."""
    for prompt, answer in rows:
        asked, told = ([0] if not prompt else []) + tokenizer.encode(prompt), tokenizer.encode(answer)
        yield torch.tensor([*asked, *told]), torch.arange(1, len(asked) + len(told)) >= len(asked)


def parted(text):
    """Take "lora:rank=8" apart: the name, and its settings."""
    name, _, settings = text.partition(":")
    pairs = [pair.split("=") for pair in settings.split(",") if pair]
    return name, {key: json.loads(value) for key, value in pairs}


def adapted(model, text, batch=None):
    """Put a method into a Model, begun from the gradient of a batch if it needs one -> its AdapterConfig."""
    method, settings = parted(text)
    word, given = ("bone", {"mode": method}) if method in BONE else (method, {})
    config = AdapterConfig(method=NONE) if method == NONE else config_of(word, given | settings)
    gradients = {}
    if method == "lora-ga":
        names = [name for name in model.base.linear_shapes if name.endswith(model.base.family.targets)]
        gradients = estimate_gradients(model.network, names, batch)
    inject(model.network, config, family=model.base.family, gradients=gradients)
    return config


def train(network, batches, rate, step):
    """Train on a batch a step; step is a training step of the package, and its loss is divided by the batch's items."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0)
    for number, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate(
            number, total_steps=len(batches), lr_init=rate, lr_final=rate / 10, warmup_steps=0, schedule="cosine"
        )
        optimizer.zero_grad()
        step.loss(network, batch, step.items(batch)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step.figures = {name: figure.item() for name, figure in step.measures.items()}


def mean_loss(network, batch):
    step = Whole()
    return (step.total(network, batch) / step.items(batch)).item()


def epochs_of(rows, most):
    return max(1, min(-(-STEPS // rows), most))


def shuffled(samples, epochs):
    return [sample for _ in range(epochs) for sample in random.sample(samples, len(samples))]


def measured(args, method, rows, times):
    """(the rate; the losses of held-out rows and of older answers before training; the same after it)."""
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    model = rp.load(args.model, precision="fp32", device="cpu")
    network, (make, most) = model.network, KINDS[args.kind]
    if args.new:
        model.base.family.init_weights(network)
    samples = [collate([row]) for row in laid(make(rows, args.seed), model.tokenizer)]
    others = [collate(list(laid(kind(HELD_OUT, 99), model.tokenizer))) for kind in (make, answers)]
    adapter = adapted(model, method, samples[0])
    rate = automatic_rate(adapter, network.config.n_embd, new=args.new).value * times
    before = [mean_loss(network, batch) for batch in others]
    train(network, shuffled(samples, epochs_of(rows, most)), rate, Whole())
    return rate, before, [mean_loss(network, batch) for batch in others]


def main():
    parser = Parser(__doc__, rows=(4,), methods=("bat-in",), times=(1,))
    parser.add_argument("--model", default=DEMO["x070"], type=Path)
    parser.add_argument("--new", action="store_true", help="draw the model's weights anew; for --methods none")
    parser.add_argument("--kind", default="chats", choices=KINDS)
    parser.add_argument("--rows", nargs="+", type=int, default=[30, 200])
    parser.add_argument("--methods", nargs="+", default=["bat-in", "bone", "lora", "dora", "pissa", "olora", "none"])
    parser.add_argument("--times", nargs="+", type=float, default=[0.3, 1, 3])
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    head("rows", "method", "rate", "before", *(f"{times:g} times" for times in args.times))
    for rows in args.rows:
        for method in args.methods:
            found = [measured(args, method, rows, times) for times in args.times]
            rate = found[0][0] / args.times[0]
            losses = (f"{own:.4f}, {older:.3f}" for own, older in [found[0][1], *(after for *_, after in found)])
            row(rows, method, f"{rate:.2g}", *losses)


if __name__ == "__main__":
    main()
