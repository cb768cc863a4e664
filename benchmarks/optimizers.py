"""Train the demo's RWKV-7 on its task by each --optim at several rates, and print the loss of rows that were kept back.

    python benchmarks/optimizers.py --steps 100 --output out/optimizers

Each run is forked from this process, which has the imports, and computes in one thread. Rates fall to a tenth along a
cosine, but for schedule_free, whose rate stays. docs/benchmarks/training.md has the last table.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

import deepspeed  # noqa: F401 - the runs need it
import torch

from rwkv_peft.tables import OPTIMS
from rwkv_peft.training.engine import trainer  # noqa: F401
from rwkv_peft.training.run import main as train

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "demo"))
from task import documents  # noqa: E402

FLAGS = (
    *"--data_type sft --tokenizer bytes --ctx_len 128 --micro_bsz 8 --precision fp32 --accelerator cpu".split(),
    *"--random_seed 1 --epoch_count 1 --answer_rows 0 --warmup_steps 5".split(),
)
RATES = {"bone": (1e-3, 3e-3, 1e-2, 3e-2), "none": (3e-4, 1e-3, 3e-3, 1e-2)}
LION = 0.3  # its rates over the others'


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--peft", nargs="+", default=list(RATES), choices=RATES)
    parser.add_argument("--output", default="out/optimizers", metavar="DIR")
    args = parser.parse_args(argv)
    folder = Path(args.output).resolve()
    folder.mkdir(parents=True)
    for kind, count in (("finetune", 8 * args.steps), ("heldout", 64)):
        rows = "".join(f"{json.dumps(row)}\n" for row in documents(kind, count, 1))
        (folder / f"{kind}.jsonl").write_text(rows)
    torch.set_num_threads(1)
    for peft in args.peft:
        rates = RATES[peft]
        print(f"\n| --optim, --peft {peft} |{' rate: loss |' * len(rates)}\n|---|{'---|' * len(rates)}")
        for optim in ("adamw", *OPTIMS):
            own = [float(f"{rate * (LION if optim == 'lion' else 1):.1g}") for rate in rates]
            losses = [measured(folder, peft, optim, rate, args.steps) for rate in own]
            cells = (f"{rate:g}: {loss and format(loss, '.4f')}" for rate, loss in zip(own, losses))
            print(f"| {optim} | {' | '.join(cells)} |", flush=True)


def measured(folder, peft, optim, rate, steps):
    """The loss of the rows that were kept back after a run, None if it diverged."""
    run = folder / f"{peft}-{optim}-{rate:g}"
    flags = (
        *(*FLAGS, "--load_model", str(ROOT / "demo" / "rwkv7-demo.pth"), "--peft", peft),
        *(("--bone_r", "16") if peft == "bone" else ()),
        *("--data_file", str(folder / "finetune.jsonl"), "--val_data", str(folder / "heldout.jsonl")),
        *("--proj_dir", str(run), "--optim", optim, "--lr_init", f"{rate:g}", "--lr_final", f"{rate / 10:g}"),
        *("--epoch_steps", str(steps)),
    )
    child = os.fork()
    if not child:
        with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            train(list(flags))
        os._exit(0)
    os.waitpid(child, 0)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return lines[-1].get("val_loss")


if __name__ == "__main__":
    main(sys.argv[1:])
