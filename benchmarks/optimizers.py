"""Trains the demo's RWKV-7 on its task by each --optim at several rates, and prints the loss of rows kept back.

    python benchmarks/optimizers.py [--steps 60] [--peft bone none]

A bare loop in one thread: forward, the loss of the answers, backward, clipping to a norm of 1, and the optimizer over
flat tensors, as ZeRO has them. Rates fall to a tenth along a cosine after 5 steps of warm-up.
docs/benchmarks/training.md has the last table.
"""

import sys

import torch
import torch.nn.functional as F
from common import DEMO, ROOT, Parser, head, row

import rwkv_peft as rp
from rwkv_peft.adapters.groups import parameter_groups
from rwkv_peft.cli.tables import OPTIMS
from rwkv_peft.config import TrainConfig
from rwkv_peft.config.train import learning_rate
from rwkv_peft.training.optimizers import make_optimizer

sys.path.insert(0, str(ROOT / "demo"))
from task import documents  # noqa: E402

RATES = {"bone": (1e-3, 3e-3, 1e-2, 3e-2), "none": (3e-4, 1e-3, 3e-3, 1e-2)}
ROWS, KEPT_BACK = 4, 32  # of a step; to measure on


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


def flattened(groups):
    """The groups with one flat tensor each in place of their parameters, which become views of it, as do gradients."""
    for group in groups:
        parameters = group["params"]
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        flat.grad = torch.zeros_like(flat)
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part, grad in zip(parameters, flat.split(sizes), flat.grad.split(sizes)):
            parameter.data, parameter.grad = part.view(parameter.shape), grad.view(parameter.shape)
        group["params"] = [flat]
    return groups


def measured(peft, optim, rate, steps):
    """The loss of the rows kept back after `steps` steps."""
    torch.manual_seed(1)
    model = rp.load(str(DEMO["x070"]), precision="fp32", device="cpu")
    if peft == "bone":
        rp.add_adapter(model, method="bone", rank=16)
    else:
        model.requires_grad_(True)
    rows = list(documents("finetune", ROWS * steps, 1))
    groups = flattened(parameter_groups(model.network, matrices_apart=optim == "muon"))
    optimizer = make_optimizer(groups, TrainConfig(optim=optim))
    flats = [group["params"][0] for group in groups]
    for step in range(steps):
        for flat in flats:
            flat.grad.zero_()
        loss_of(model, batch_of(rows[ROWS * step : ROWS * (step + 1)], model.tokenizer)).backward()
        torch.nn.utils.clip_grad_norm_(flats, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(
                step, total_steps=steps, lr_init=rate, lr_final=rate / 10, warmup_steps=5
            )
        optimizer.step()
    with torch.no_grad():
        return float(loss_of(model, batch_of(list(documents("heldout", KEPT_BACK, 1)), model.tokenizer)))


def main(argv):
    parser = Parser(__doc__, steps=1, peft=("bone",), rates=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--peft", nargs="+", default=list(RATES), choices=RATES)
    parser.add_argument("--rates", type=int, default=4, help="the first so many")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for peft in args.peft:
        rates_of = RATES[peft][: args.rates]
        print()
        head(f"--peft {peft}", *["rate: loss"] * len(rates_of))
        for optim in ("adamw", *OPTIMS):
            row(optim, *(f"{rate:g}: {measured(peft, optim, rate, args.steps):.4f}" for rate in rates_of))


if __name__ == "__main__":
    main(sys.argv[1:])
