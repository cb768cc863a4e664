"""Trains on chats in a manner that the demo's bases do not know, alone and with what keeps a base as it was: the loss
of other chats, and of the stories that the bases know.

    python benchmarks/forgetting.py [--models x070 x060] [--rows 100] [--seeds 1 2 3]

A bare loop in one thread, as train.py would train: bat-in of rank 64 in float32, 4 rows a step, 4 epochs of the chats,
a rate that falls to a tenth along a cosine; "rate" is over that of --lr_init auto. A seed draws the chats, their order
and the stories to replay; the held-out chats and stories are the same in all. ± is the standard deviation over the
seeds. docs/benchmarks/methods.md has the last table.
"""

import json
import statistics
import sys
import tempfile
from itertools import islice
from pathlib import Path

import torch
from common import DEMO, ROOT, Parser, head, row
from few_rows import HELD_OUT, adapted, mean_loss, questions, train

import rwkv_peft as rp
from rwkv_peft.config import DataConfig
from rwkv_peft.data.batches import TrainBatches
from rwkv_peft.data.samples import collate
from rwkv_peft.data.sources import build_samples
from rwkv_peft.objectives.next_token import NextToken
from rwkv_peft.training.rates import automatic_rate
from rwkv_peft.training.step.steps import Whole

sys.path.insert(0, str(ROOT / "demo"))
from task import documents  # noqa: E402

STORIES, BATCH = 400, 4  # stories that there are to replay, and rows of a step
RUNS = {  # name -> the rate over the rule's, --replay_share, --kl_to_base
    "alone": (1, 0, 0),
    "slow": (0.3, 0, 0),
    "replay-0.05": (1, 0.05, 0),
    "replay-0.1": (1, 0.1, 0),
    "replay-0.2": (1, 0.2, 0),
    "kl-0.03": (1, 0, 0.03),
    "kl-0.1": (1, 0, 0.1),
    "kl-0.3": (1, 0, 0.3),
    "both": (1, 0.1, 0.1),
}


def chats(number, seed):
    """Rows of chats in the manner to learn."""
    for prompt, told in questions(number, seed):
        query = prompt.removeprefix("User: ").removesuffix("\n\nAssistant:")
        yield {"query": query, "response": f"Aye, {told}, captain!"}


def stories(number, seed):
    """Rows of what the bases were trained on, whose answers count, as they did there."""
    for document in documents("base", number, seed):
        parts = document["text"].replace("A:", "A:\0").replace("\n", "\n\0").split("\0")
        marks = [before.endswith("A:") for before in ("", *parts)]
        yield {"segments": [{"text": text, "train": mark} for text, mark in zip(parts, marks)]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples_of(path, **settings):
    """Samples of rows as train.py makes them, with further settings of the data."""
    of_rows = dict(data_type="sft", tokenizer="bytes", ctx_len=256, dataload="pad", loss_mask="file")
    return build_samples(DataConfig(str(path), **of_rows, **settings), 257)


def measured(folder, args, version, run, seed):
    """(steps, losses of held-out chats and of stories before training, the same after it)."""
    torch.manual_seed(seed)
    times, share, weight = RUNS[run]
    model = rp.load(DEMO[version], precision="fp32", device="cpu")
    network, replay = model.network, {}
    if share:
        replay = {"replay": str(write(folder / "replay.jsonl", stories(STORIES, seed))), "replay_share": share}
    found = samples_of(write(folder / "chats.jsonl", chats(args.rows, seed)), seed=seed, **replay)
    others = [samples_of(write(folder / "others.jsonl", make(HELD_OUT, 99))) for make in (chats, stories)]
    others = [collate([each[n] for n in range(len(each))]) for each in others]
    adapter = adapted(model, "bat-in")
    rate = automatic_rate(adapter, network.config.n_embd).value * times
    before = [mean_loss(network, batch) for batch in others]
    steps = -(-len(found) * args.epochs // BATCH)
    train(network, list(islice(TrainBatches(found, BATCH), steps)), rate, Whole(NextToken(weight)))
    return steps, before, [mean_loss(network, batch) for batch in others]


def shown(losses):
    """Losses over the seeds, as a mean and its spread."""
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.3f}{spread}"


def main():
    parser = Parser(__doc__, models=("x070",), runs=("both",), seeds=(1,), rows=4, epochs=1)
    parser.add_argument("--models", nargs="+", default=("x070", "x060"), choices=tuple(DEMO))
    parser.add_argument("--runs", nargs="+", default=tuple(RUNS), choices=tuple(RUNS))
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 2, 3))
    args = parser.parse_args()
    torch.set_num_threads(1)
    head("base", "rate", "replay_share", "kl_to_base", "steps", "held-out chats", "stories that the base knows")
    for version in args.models:
        name = f"RWKV-{version[2]}"
        for number, run in enumerate(args.runs):
            with tempfile.TemporaryDirectory() as folder:
                found = [measured(Path(folder), args, version, run, seed) for seed in args.seeds]
            steps, before, after = zip(*found)
            if number == 0:
                row(name, *[""] * 3, 0, *map(shown, zip(*before)))
            row(name, *(f"{each:g}" if each else "" for each in RUNS[run]), steps[0], *map(shown, zip(*after)))


if __name__ == "__main__":
    main()
