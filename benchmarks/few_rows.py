"""Trains on a few chats by each method, at multiples of --lr_init auto, and prints the loss of others.

    python benchmarks/few_rows.py [--rows 30 200] [--methods bat-in lora none] [--times 0.3 1 3] [--model PTH]

The chats are in a manner that the demo's bases do not know: "Tom has 6 golden maps. Who has something?" is answered
"Aye, Tom, captain!". A bare loop in one thread, as a run without further flags would train: a row a step, as many
epochs as make 200 steps and 15 at most, a rate that falls to a tenth along a cosine, and clipping to a norm of 1.
docs/guides/learning-rates.md has the last table.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from optimizers import ROOT, batch_of, loss_of

import rwkv_peft as rp
from rwkv_peft.api.adapters import config_of
from rwkv_peft.config import AIM, MOST_EPOCHS, AdapterConfig
from rwkv_peft.config.methods import BONE
from rwkv_peft.config.schedules import learning_rate
from rwkv_peft.names import NONE
from rwkv_peft.training.flags.rates import automatic_rate

sys.path.insert(0, str(ROOT / "demo"))
from task import COLORS, COUNTS, ITEMS, NAMES  # noqa: E402

HELD_OUT = 30


def chats(number, seed):
    """Rows of a question about a fact, and its answer in the manner."""
    draw, rows = random.Random(seed), []
    for _ in range(number):
        who, count, color, item = (draw.choice(words) for words in (NAMES, COUNTS, COLORS, ITEMS))
        asked, told = draw.choice(
            [("Who has something?", who), ("How many?", count), ("What is there?", f"{color} {item}")]
        )
        prompt = f"User: {who} has {count} {color} {item}. {asked}\n\nAssistant:"
        rows.append({"prompt": prompt, "completion": f" Aye, {told}, captain!\n\nUser:"})
    return rows


def measured(path, method, rows, times, seed=1):
    """(the rate, the loss of held-out chats before training, the same after it)."""
    torch.manual_seed(seed)
    model = rp.load(path, precision="fp32", device="cpu")
    adapter = AdapterConfig(method=NONE)
    if method == NONE:
        model.requires_grad_(True)
    else:
        word, settings = ("bone", {"mode": method}) if method in BONE else (method, {})
        rp.add_adapter(model, method=word, **settings)
        adapter = config_of(word, settings)
    rate = automatic_rate(adapter, model.network.config.n_embd).value * times
    training, held_out = chats(rows, seed), batch_of(chats(HELD_OUT, 99), model.tokenizer)
    with torch.no_grad():
        before = loss_of(model, held_out).item()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0)
    steps = min(-(-AIM // rows), MOST_EPOCHS) * rows
    order = [row for _ in range(steps // rows) for row in random.sample(training, rows)]
    for step, row in enumerate(order):
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, total_steps=steps, lr_init=rate, lr_final=rate / 10, warmup_steps=0, schedule="cosine"
        )
        optimizer.zero_grad()
        loss_of(model, batch_of([row], model.tokenizer)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    with torch.no_grad():
        return rate, before, loss_of(model, held_out).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "demo" / "rwkv7-demo.pth"), type=Path)
    parser.add_argument("--rows", nargs="+", type=int, default=[30, 200])
    parser.add_argument("--methods", nargs="+", default=["bat-in", "bone", "lora", "dora", "pissa", "olora", "none"])
    parser.add_argument("--times", nargs="+", type=float, default=[0.3, 1, 3])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| rows | method | rate | before |" + "".join(f" {times:g} times |" for times in args.times))
    print("|---|---|---|---|" + "---|" * len(args.times))
    for rows in args.rows:
        for method in args.methods:
            found = [measured(args.model, method, rows, times) for times in args.times]
            rate, before = found[0][0] / args.times[0], found[0][1]
            losses = "".join(f" {after:.4f} |" for *_, after in found)
            print(f"| {rows} | {method} | {rate:.2g} | {before:.4f} |{losses}", flush=True)


if __name__ == "__main__":
    main()
