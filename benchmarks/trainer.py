"""The time that train.py takes besides the step itself: Lightning, DeepSpeed, callbacks, logging and the data.

    python benchmarks/trainer.py [--methods bat-in none] [--dtypes fp32] [--rounds 20] [--profile 30]

An RWKV-6 of 23 M parameters trains on rows of 512 tokens on the CPU through train.py's own code. After each whole step
of it, the same model takes a step in a bare loop in the same process: forward, loss, backward, clipping and AdamW, on
the same batch. The two take turns, so that a machine's drift affects both. Times are processor time, over all threads
of the process; their medians and the median of the ratios within a round are printed. The first steps, in which kernels
load and buffers are made, do not count, nor the last one, which saves. --profile prints the functions that take most of
the trainer's time, by Python's profiler, which slows the trainer.
"""

import argparse
import contextlib
import copy
import cProfile
import io
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from rwkv_peft.adapters.groups import parameter_groups
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.files.base import save_model
from rwkv_peft.models import family_named
from rwkv_peft.training import run
from rwkv_peft.training.engine import callbacks
from rwkv_peft.training.step.steps import Whole

LAYERS, CHANNELS, VOCABULARY, TOKENS = 8, 384, 8192, 512
WARM_UP = 3
METHODS = {"bat-in": ("--bone_r", "64"), "none": ("--peft", "none")}


class Turns:
    """Takes a step of the bare loop after each of the trainer's; times, (trainer, bare) of each round."""

    def __init__(self, profile):
        self.profile, self.times, self.began = profile, [], None

    def make(self, model):
        """The bare loop's model and optimizer, before the engine has taken the model over."""
        self.model = copy.deepcopy(model)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model), lr=2e-5, fused=True)

    def after_a_step(self, batch):
        if self.profile is not None:
            self.profile.disable()
        now = time.process_time()
        self.step(batch)
        bare = time.process_time() - now
        if self.began is not None:
            self.times.append((now - self.began, bare))
        if self.profile is not None and len(self.times) >= WARM_UP:
            self.profile.enable()
        self.began = time.process_time()

    def step(self, batch):
        loss = Whole().loss(self.model, batch, max(1, batch["step_count"]))
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure(method, dtype, args):
    """Print the line of one method."""
    turns = Turns(cProfile.Profile() if args.profile else None)
    fit, ended = run.fit, callbacks.StopSignals.on_train_batch_end

    def fit_beside(config, family, model, *rest):
        turns.make(model)
        return fit(config, family, model, *rest)

    def on_train_batch_end(self, trainer, lit, outputs, batch, batch_idx):
        ended(self, trainer, lit, outputs, batch, batch_idx)
        turns.after_a_step(batch)

    run.fit, callbacks.StopSignals.on_train_batch_end = fit_beside, on_train_batch_end  # the last of the callbacks
    with tempfile.TemporaryDirectory() as folder:
        argv = [*inputs(Path(folder)), *METHODS[method], "--precision", dtype, "--accelerator", "cpu"]
        argv += ["--ctx_len", str(TOKENS), "--epoch_steps", str(args.rounds + WARM_UP + 2), "--epoch_save", "0"]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            code = run.main(argv)
        if code:
            raise SystemExit(f"train.py ended with exit code {code}:\n{said.getvalue()}")
    mine, bare = zip(*turns.times[WARM_UP:-1])  # the last one saves
    ratio = statistics.median(a / b for a, b in zip(mine, bare))
    milliseconds = " | ".join(f"{1e3 * statistics.median(times):.0f}" for times in (bare, mine))
    print(f"| {method} | {dtype} | {milliseconds} | {ratio:.3f} |", flush=True)
    if turns.profile is not None:
        turns.profile.disable()
        pstats.Stats(turns.profile).sort_stats("tottime").print_stats(args.profile)


def inputs(folder):
    """Write a model and data there -> their flags."""
    torch.manual_seed(0)
    family = family_named("x060")
    model = family.build(family.new_dimensions(LAYERS, CHANNELS, VOCABULARY))
    family.init_weights(model)
    save_model(folder / "base.pth", model.state_dict())
    with ShardWriter(folder / "data", vocab_size=VOCABULARY) as writer:
        for document in torch.randint(1, VOCABULARY, (20, 2 * TOKENS)):
            writer.add(document.tolist())
    names = {"load_model": "base.pth", "data_file": "data", "proj_dir": "out"}
    return [f"--{flag}={folder / name}" for flag, name in names.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS))
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=("fp32",))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", type=int, default=0, metavar="N")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        return measure(*args.one, args)
    print("| method | dtype | bare loop, ms | train.py, ms | ratio |\n|---|---|---|---|---|", flush=True)
    for method in args.methods:  # each in a process of its own: the engine keeps global state
        for dtype in args.dtypes:
            numbers = (f"--{name}={getattr(args, name)}" for name in ("rounds", "threads", "profile"))
            subprocess.run([sys.executable, __file__, "--one", method, dtype, *numbers], check=True)


if __name__ == "__main__":
    main()
