"""Trains on a few pairs, or labelled answers, by each objective: what becomes of held-out answers.

    python benchmarks/few_pairs.py [--rows 30 200] [--objectives dpo dpo:nll=1 orpo kto] [--times 0.3 1 3] [--batch 1]
                                   [--seed 3]

The demo's RWKV-7 is first taught to answer in one manner seven times of ten, and in another three times. Pairs of other
facts then prefer the rarer manner; kto gets one answer of each, in turns. As in few_rows.py: a bare loop in one thread,
bat-in, as many steps, and multiples of --lr_init auto. A column has the share of held-out pairs whose chosen answer is
the likelier one, the mean loss of its tokens, and the share of chosen answers that are the model's own word for word.
docs/guides/preferences.md has the last table.
"""

import copy
import random
from pathlib import Path

import torch
from common import DEMO, Parser, head, row
from few_rows import adapted, epochs_of, laid, parted, questions, shuffled, train

import rwkv_peft as rp
from rwkv_peft.config.train import AIM_OF_OTHERS
from rwkv_peft.data.answer_samples import mismatched
from rwkv_peft.data.binidx import UNDESIRABLE
from rwkv_peft.data.samples import collate
from rwkv_peft.objectives import OBJECTIVES
from rwkv_peft.objectives.documents import per_document
from rwkv_peft.training.rates import automatic_rate
from rwkv_peft.training.step.steps import Whole

HELD_OUT, OFTEN = 40, 7
USUAL, RARE = " It is {}, sir.\n\nUser:", " Aye, {}, captain!\n\nUser:"


def pairs(number, seed, tokenizer):
    """Lists of two documents: a fact's answer in the rare manner, and the same in the usual one."""
    for prompt, told in questions(number, seed):
        yield list(laid(((prompt, manner.format(told)) for manner in (RARE, USUAL)), tokenizer))


def labelled(rows):
    """Make the pairs to what kto learns from: one answer of each, in turns, and its prompt with that of the next."""
    turns = [row[number % 2] for number, row in enumerate(rows)]
    own = [(tokens, mask.to(torch.uint8) * (UNDESIRABLE if n % 2 else 1)) for n, (tokens, mask) in enumerate(turns)]
    return [[one, mismatched(one, other, 1024)] for one, other in zip(own, [*own[1:], own[0]])]


def taught(path, number):
    """A Model that answers in both manners, after so many rows of them."""
    model = rp.load(path, precision="fp32", device="cpu")
    model.network.requires_grad_(True)
    rows = [row[place % 10 < OFTEN] for place, row in enumerate(pairs(number, 2, model.tokenizer))]
    train(model.network, [collate([row]) for row in rows], 5e-4, Whole())
    return model


@torch.no_grad()
def judged(network, batch):
    """(share of pairs whose first answer is the likelier, its loss a token, share of those given word for word)."""
    logits, _ = network(batch["tokens"], None, batch["cu_seqlens"])
    logits, targets = logits[0][batch["counted"]], batch["targets"][0][batch["counted"]]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    totals, wrong, tokens = (
        per_document(batch, values).view(-1, 2) for values in (losses, logits.argmax(-1) != targets, targets >= 0)
    )
    shares = (totals[:, 0] < totals[:, 1], totals[:, 0] / tokens[:, 0], wrong[:, 0] == 0)
    return tuple(share.double().mean().item() for share in shares)


def measured(args, model, objective, rows, times):
    """(the rate, and what is judged after training)."""
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    model, tokenizer = copy.deepcopy(model), model.tokenizer
    samples = list(pairs(rows, args.seed, tokenizer))
    adapter = adapted(model, "bat-in")
    rate = automatic_rate(adapter, model.network.config.n_embd, objective).value * times
    order = shuffled(labelled(samples) if "labels" in objective.rows else samples, epochs_of(rows, AIM_OF_OTHERS))
    batches = [collate(order[first : first + args.batch]) for first in range(0, len(order), args.batch)]
    train(model.network, batches, rate, Whole(objective))
    return rate, judged(model.network, collate(list(pairs(HELD_OUT, 99, tokenizer))))


def objective_of(text):
    name, settings = parted(text)
    return OBJECTIVES[name](**settings)


def main():
    parser = Parser(__doc__, rows=(4,), objectives=("dpo",), times=(1,), taught=4)
    parser.add_argument("--model", default=DEMO["x070"], type=Path)
    parser.add_argument("--rows", nargs="+", type=int, default=[30, 200])
    parser.add_argument("--objectives", nargs="+", default=["dpo:nll=0", "dpo:nll=1", "orpo", "kto"])
    parser.add_argument("--times", nargs="+", type=float, default=[0.3, 1, 3])
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="rows of a step")
    parser.add_argument("--taught", type=int, default=600, help="rows of both manners that the model learns first")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = taught(args.model, args.taught)
    told = judged(model.network, collate(list(pairs(HELD_OUT, 99, model.tokenizer))))
    print("before: {:.2f}, {:.3f}, {:.2f}\n".format(*told))
    head("rows", "objective", "rate", *(f"{times:g} times" for times in args.times))
    for rows in args.rows:
        for text in args.objectives:
            found = [measured(args, model, objective_of(text), rows, times) for times in args.times]
            cells = ("{:.2f}, {:.3f}, {:.2f}".format(*after) for _, after in found)
            row(rows, text, f"{found[0][0] / args.times[0]:.2g}", *cells)


if __name__ == "__main__":
    main()
