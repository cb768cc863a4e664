"""Tunes parts of the states of the demo's models on the demo's task, and prints the loss of rows kept back.

    python benchmarks/states.py [--steps 40] [--rates 0.1 1]

A bare loop in one thread: forward, the loss of the answers, backward, clipping to a norm of 1, and AdamW at a rate that
falls to a tenth, on the rows of three seeds. docs/benchmarks/training.md has the last table.
"""

import statistics
import sys

import torch
import torch.nn.functional as F
from common import DEMO, ROOT, Parser, head, row

import rwkv_peft as rp
from rwkv_peft.config.train import learning_rate
from rwkv_peft.models import family_named

sys.path.insert(0, str(ROOT / "demo"))
from task import documents  # noqa: E402

ROWS, KEPT_BACK = 4, 32  # of a step; to measure on
PARTS = (("wkv",), ("shift",), ("wkv", "shift"))


def batch_of(rows, tokenizer):
    """(tokens (B, T), which of tokens[:, 1:] are the answers' (B, T - 1))."""
    ids = [(tokenizer.encode(row["prompt"]), tokenizer.encode(row["completion"])) for row in rows]
    length = max(len(prompt) + len(answer) for prompt, answer in ids)
    tokens = torch.zeros(len(ids), length, dtype=torch.int64)
    counts = torch.zeros(len(ids), length - 1, dtype=torch.bool)
    for place, (prompt, answer) in enumerate(ids):
        end = len(prompt) + len(answer)
        tokens[place, :end] = torch.tensor([*prompt, *answer])
        counts[place, len(prompt) - 1 : end - 1] = True
    return tokens, counts


def loss_of(model, batch):
    tokens, counts = batch
    logits, _ = model(tokens[:, :-1])
    return F.cross_entropy(logits[counts], tokens[:, 1:][counts])


def measured(version, parts, rate, steps, seed):
    """The loss of the rows kept back after `steps` steps."""
    model = rp.load(str(DEMO[version]), precision="fp32", device="cpu")
    rp.add_adapter(model, method="none", train_parts=("state",), state_parts=parts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    rows = list(documents("finetune", ROWS * steps, seed))
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch_of(rows[ROWS * step : ROWS * (step + 1)], model.tokenizer)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, total_steps=steps, lr_init=rate, lr_final=rate / 10, warmup_steps=5, schedule="cosine"
        )
        optimizer.step()
    with torch.no_grad():
        return float(loss_of(model, batch_of(list(documents("heldout", KEPT_BACK, 1)), model.tokenizer)))


def main(argv):
    parser = Parser(__doc__, steps=1, rates=[0.1], seeds=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    head("model", "states", "before", *(f"{rate:g}" for rate in args.rates))
    for version in DEMO:
        before = f"{measured(version, PARTS[0], 0, 0, 0):.4f}"
        for parts in PARTS:
            cells = []
            for rate in args.rates:
                found = [measured(version, parts, rate, args.steps, 1 + seed) for seed in range(args.seeds)]
                cells.append(f"{statistics.mean(found):.4f} ({min(found):.4f} to {max(found):.4f})")
            row(family_named(version).name, " + ".join(parts), before, *cells)


if __name__ == "__main__":
    main(sys.argv[1:])
