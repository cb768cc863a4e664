"""The time that train.py takes besides the step itself: its engine, measuring, logging and the data.

    python benchmarks/trainer.py [--methods bat-in none] [--dtypes fp32] [--rounds 20] [--accelerator gpu]

An RWKV-6 of 23 M parameters trains on rows of 512 tokens through train.py's own code. After each whole step of it, the
same model takes a step in a bare loop in the same process: forward, loss, backward, clipping and AdamW, on the same
batch. The two take turns, so that a machine's drift affects both. Times are processor time, over all threads of the
process, on a GPU the clock's until all is computed; their medians and the median of the ratios within a round are
printed. The first steps, in which kernels load and buffers are made, do not count, nor the last one, which saves.
"""

import argparse
import contextlib
import copy
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import Parser, head, row, write_model, write_tokens
from torch import nn

from rwkv_peft.adapters.groups import parameter_groups
from rwkv_peft.training import loop, prepared, run
from rwkv_peft.training.step.steps import Whole

VOCABULARY, TOKENS = 8192, 512
WARM_UP = 3
METHODS = {"bat-in": ("--bone_r", "64"), "none": ("--peft", "none")}


class Turns:
    """Takes a step of the bare loop after each of the trainer's; times, (trainer, bare) of each round."""

    def __init__(self, on_gpu):
        self.on_gpu, self.times, self.began, self.optimizer = on_gpu, [], None, None

    def clock(self):
        if not self.on_gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def make(self, model):
        """The bare loop's model, before the engine has taken the model over."""
        self.model = copy.deepcopy(model)

    def after_a_step(self, batch):
        now = self.clock()
        self.step(batch)
        bare = self.clock() - now
        if self.began is not None:
            self.times.append((now - self.began, bare))
        self.began = self.clock()

    def step(self, batch):
        if self.optimizer is None:  # at the first step
            self.model.to(batch["tokens"].device)
            self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.AdamW(parameter_groups(self.model), lr=2e-5, fused=True)
        loss = Whole().loss(self.model, batch, max(1, batch["step_count"]))
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure(method, dtype, args):
    """Print the line of one method."""
    turns = Turns(args.accelerator == "gpu")
    make_engine, take_step, save, last = prepared.make_engine, loop.take_step, loop.save, {}

    def engine_beside(model, *others):
        turns.make(model)
        return make_engine(model, *others)

    def keep_batch(run, step, batches, *others):
        last["batch"] = next(batches)
        return take_step(run, step, iter([last["batch"]]), *others)

    def step_beside(*arguments):  # the last that a step of the loop does
        saved = save(*arguments)
        turns.after_a_step(last["batch"])
        return saved

    prepared.make_engine, loop.take_step, loop.save = engine_beside, keep_batch, step_beside
    with tempfile.TemporaryDirectory() as folder:
        argv = [*inputs(Path(folder), args), *METHODS[method], "--precision", dtype]
        argv += ["--accelerator", args.accelerator]
        argv += ["--ctx_len", str(TOKENS), "--epoch_steps", str(args.rounds + WARM_UP + 2), "--epoch_save", "0"]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            code = run.main(argv)
        if code:
            raise SystemExit(f"train.py ended with exit code {code}:\n{said.getvalue()}")
    mine, bare = zip(*turns.times[WARM_UP:-1])  # the last one saves
    ratio = statistics.median(a / b for a, b in zip(mine, bare))
    row(method, dtype, *(f"{1e3 * statistics.median(times):.0f}" for times in (bare, mine)), f"{ratio:.3f}")


def inputs(folder, args):
    """Write a model and data there -> their flags."""
    write_model(folder / "base.pth", "x060", args.layers, args.channels, VOCABULARY)
    write_tokens(folder / "data", VOCABULARY, torch.randint(1, VOCABULARY, (20, 2 * TOKENS)).tolist())
    names = {"load_model": "base.pth", "data_file": "data", "proj_dir": "out"}
    return [f"--{flag}={folder / name}" for flag, name in names.items()]


def main():
    parser = Parser(__doc__, methods=("bat-in",), rounds=1, layers=1, channels=128)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS))
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=("fp32",))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        return measure(*args.one, args)
    head("method", "dtype", "bare loop, ms", "train.py, ms", "ratio")
    for method in args.methods:  # each in a process of its own: the engine keeps global state
        for dtype in args.dtypes:
            names = ("rounds", "layers", "channels", "accelerator", "threads")
            numbers = (f"--{name}={getattr(args, name)}" for name in names)
            subprocess.run([sys.executable, __file__, "--one", method, dtype, *numbers], check=True)


if __name__ == "__main__":
    main()
