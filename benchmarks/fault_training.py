"""Training that faults.py kills: while it saves, and after some steps of every method, ZeRO stage and number of ranks.

A run ends as it should if its files of trained tensors and its numbers (but the times) are bitwise those of the
unbroken one, and nothing else is hidden in its folder.
"""

import contextlib
import importlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from types import MappingProxyType
from typing import NamedTuple

import torch
from fault_processes import drop_privileges, ended, started

from rwkv_peft import commands
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.errors import UserError
from rwkv_peft.files.base import save_model
from rwkv_peft.models import family_named
from rwkv_peft.training.saving.checkpoints import list_checkpoints
from rwkv_peft.training.saving.run_state import require_files

METHODS = MappingProxyType(
    {
        "bone": ("--bone_mode", "bone", "--bone_r", "8"),
        "bat-in": ("--bone_mode", "bat-in", "--bone_r", "8"),
        "bat-out": ("--bone_mode", "bat-out", "--bone_r", "8"),
        "lora": ("--peft", "lora", "--lora_config", '{"lora_r": 8}'),
        "pissa": ("--peft", "pissa", "--pissa_config", '{"pissa_r": 8}'),
        "none": ("--peft", "none"),
        "state": ("--peft", "none", "--train_parts", "state"),
    }
)
SHORT = ("--epoch_steps", "2", "--epoch_count", "3")  # three saves, and the first checkpoint gives way to the third
LONG = ("--epoch_steps", "20", "--epoch_count", "3", "--save_every", "5")
STOPPED = 25  # steps of LONG after which a run is stopped, which is when a save begins,
SAVING = 0.05  # or up to so many seconds later
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
AGAIN = ("--resume", "auto")
NUMBERS = ("step", "epoch", "loss", "lr", "grad_norm", "tokens")
# for a method: (ranks, ZeRO stage) on which a run begins, and on which it goes on, time and again
MOVES = (
    ("bat-in", ((2, 3), (1, 1), (4, 2))),
    ("none", ((1, 2), (2, 1), (1, 3))),
    ("lora", ((4, 1), (2, 2), (1, 1))),
    ("state", ((2, 2), (4, 3), (2, 1))),
)
TOGETHER = 4  # samples of a step of a run that moves
NEAR = 1e-3  # how far, in parts, its losses may be from those of the run that stayed
LIMIT = 900  # seconds that a run may take, on a machine that others use


class Outcome(NamedTuple):
    """A run's results: {name: bytes} of its trained tensors, a dict of NUMBERS for each step, names of hidden files."""

    files: dict
    numbers: list
    hidden: list


class Configuration(NamedTuple):
    """A method, a ZeRO stage, a number of ranks, and the signal that stops the run."""

    method: str
    stage: int
    ranks: int
    number: signal.Signals


class Training:
    """Runs of train.py in folders of `folder`, on one tiny base; faults lists the failed expectations."""

    def __init__(self, folder, rng):
        self.folder, self.rng, self.faults = folder, rng, []
        folder.mkdir()
        torch.manual_seed(0)
        family = family_named("x060")
        model = family.build(family.new_dimensions(2, 64, 80))
        family.init_weights(model)
        save_model(folder / "base.pth", model.state_dict())
        with ShardWriter(folder / "data", vocab_size=80) as writer:
            for first in range(40):
                writer.add([1 + (first + 7 * i) % 79 for i in range(50 + first)] + [0])
        import_libraries()

    def start(self, name, *flags, node=0, operation=0, action=None, **variables):
        """Start the first process of a node of a run in the folder `name`; operation as in started(); action runs in
        place of train()."""
        run = self.folder / name
        inputs = ("--load_model", self.folder / "base.pth", "--data_file", self.folder / "data", "--proj_dir", run)
        fixed = ("--ctx_len", "24", "--lr_init", "1e-2", "--precision", "fp32", "--accelerator", "cpu")
        argv = [*map(str, inputs), *fixed, *flags]
        return started(action or train, argv, self.log(name, node), variables, operation=operation, folder=run)

    def log(self, name, node=0):
        """The file of what a node of the run in the folder `name` said last."""
        return self.folder / f"{name}.{node}"

    def expect(self, holds, name, what):
        if not holds:
            said = self.log(name).read_text().strip().splitlines()
            self.faults.append(f"training, {name}: {what}" + f"; it said last: {said[-1]}" * bool(said))
            print(self.faults[-1], file=sys.stderr, flush=True)

    def whole(self, name, *flags):
        """The Outcome of an unbroken run, which runs only once."""
        if not (self.folder / name).exists():
            assert wait(self.start(name, *flags)) == 0, self.log(name).read_text()
        return self.outcome(name)

    def outcome(self, name):
        """The Outcome of the run in the folder `name`."""
        run = self.folder / name
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        hidden = sorted(path.name for path in run.rglob(".*"))
        return Outcome(trained_files(run), [{key: line[key] for key in NUMBERS} for line in lines], hidden)

    def goes_on(self, name, unbroken, processes):
        """Expect the processes of a resumed run to end well, with the Outcome of the unbroken one."""
        codes = [wait(process) for process in processes]
        well = set(codes) == {0}
        self.expect(well, name, f"going on ended with the exit codes {codes}")
        self.expect(not well or self.outcome(name) == unbroken, name, "a run that went on ended otherwise")

    def kill_at_operations(self, every, *more):
        """Kill a run before each `every`-th of its operations on the files of its folder; yields True for each. Files
        of epochs may go where `more` flags say so, but for those of the newest checkpoint."""
        flags, newest, names = (*METHODS["bat-in"], *SHORT), 0, set()
        title, whole = " ".join(("saves", *more)), set(self.whole("saves", *flags).files.values())
        flags += more
        unbroken = self.whole(title, *flags)
        for operation in itertools.count(1, every):
            name = f"{title}, operation {operation}"
            if wait(self.start(name, *flags, *AGAIN, operation=operation)) != -signal.SIGKILL:
                return
            left = trained_files(self.folder / name)
            self.expect(set(left.values()) <= whole, name, "a file is torn")
            done = self.newest_checkpoint(name)
            due = {f"adapter-epoch-{done // 2}.safetensors"} - {"adapter-epoch-0.safetensors"} if more else names
            kept = done >= newest and due <= left.keys()
            self.expect(kept, name, "a checkpoint or a file was lost that an earlier kill had left")
            newest, names = done, left.keys()
            self.goes_on(name, unbroken, [self.start(name, *flags, *AGAIN)])
            shutil.rmtree(self.folder / name)
            yield True

    def newest_checkpoint(self, name):
        """The step of the newest checkpoint, 0 if there is none; expects each to be whole."""
        done = 0
        for checkpoint in list_checkpoints(self.folder / name):
            try:
                state = json.loads((checkpoint / "state.json").read_text())
                require_files(checkpoint, state["files"], fresh_optimizer=False, contents=True)
                done = state["step"]
            except (UserError, ValueError) as error:
                self.expect(False, name, f"a checkpoint is torn: {error}")
        return done

    def stop_and_resume(self, configuration):
        """Stop a run of a Configuration after some steps, and resume it -> True if it was still at work then."""
        method, stage, ranks, number = configuration
        name = f"{method}, stage {stage}, {ranks} of {number.name}"
        flags = (*METHODS[method], *LONG, "--strategy", f"deepspeed_stage_{stage}", "--devices", str(ranks))
        unbroken = self.whole(f"{name}, unbroken", *flags)
        process = self.start(name, *flags)
        wait_for_steps(self.folder / name, STOPPED, process)
        time.sleep(self.rng.uniform(0, SAVING))
        os.kill(process, number)
        code = wait(process)
        stopped = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM}[number]
        self.expect(code in (0, stopped), name, f"{number.name} ended it with exit code {code}")
        if code == stopped:
            self.goes_on(name, unbroken, [self.start(name, *flags, *AGAIN)])
        return code == stopped

    def move(self, move):
        """Kill a run after some steps, at a random moment, and let it go on on other ranks and at another stage, for
        all of a move -> True if it was still at work each time."""
        method, machines = move
        flags = (*METHODS[method], *LONG)
        unbroken = self.whole(f"{method}, stays", *flags, "--accumulate_grad_batches", str(TOGETHER))
        name, hit = f"{method}, moves", True
        for number, (ranks, stage) in enumerate(machines, 1):
            machine = ("--devices", str(ranks), "--strategy", f"deepspeed_stage_{stage}")
            begins = ("--accumulate_grad_batches", str(TOGETHER // ranks)) if number == 1 else ()  # then it follows
            process = self.start(name, *flags, *machine, *begins, *AGAIN)
            if number < len(machines):
                wait_for_steps(self.folder / name, 15 * number, process)
                time.sleep(self.rng.uniform(0, SAVING))
                os.kill(process, signal.SIGKILL)
                hit = wait(process) == -signal.SIGKILL and hit
        well = wait(process) == 0
        self.expect(well, name, "a run that moved did not end well")
        if not well:
            return hit
        moved = self.outcome(name)
        pairs = list(zip(moved.numbers, unbroken.numbers))
        near = all(math.isclose(ours["loss"], theirs["loss"], rel_tol=NEAR) for ours, theirs in pairs)
        same = [line["step"] for line in moved.numbers] == [line["step"] for line in unbroken.numbers]
        self.expect(near and same and not moved.hidden, name, "a run that moved ended otherwise")
        return hit


def configurations():
    """The Configurations of the whole matrix; its first 14 hold each method on each number of ranks."""
    return [
        Configuration(method, (shift + place + ranks) % 3 + 1, ranks, SIGNALS[(shift + place) % 2])
        for shift, (place, method), ranks in itertools.product(range(3), enumerate(METHODS), (1, 2))
    ]


def import_libraries():
    """Import a run's libraries, once for all processes that are forked from here."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # as the run itself would before it imports DeepSpeed
    for name in (
        *("compare.command", "data.preprocess", "evals.command", "generate.command", "plan.command", "plots"),
        *("release.check", "release.merge_command"),
        *(f"training.{name}" for name in ("engine.callbacks", "engine.strategy", "step.lit")),
    ):
        importlib.import_module(f"rwkv_peft.{name}")


def train(argv, log, variables):
    """Run train.py in this process, as run_command does."""
    return run_command(["train", *argv], log, variables)


def run_command(words, log, variables):
    """Run a command of rwkv-peft in this process, with its output in the file `log` -> its exit code."""
    os.environ.update(variables)
    sys.argv = ["rwkv-peft", *words]
    with open(log, "w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 1)  # for the processes that it starts
        os.dup2(file.fileno(), 2)
        try:
            commands.run()
        except SystemExit as end:
            return end.code


def train_unprivileged(argv, log, variables):
    """train() as a user whom permissions bind."""
    drop_privileges()
    return train(argv, log, variables)


def is_over(process):
    """True if a process that this one started has ended; its exit code can still be read."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait(process, seconds=LIMIT):
    """The exit code of a process, which is killed if it takes too long."""
    deadline = time.monotonic() + seconds
    while not is_over(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    if not is_over(process):
        os.kill(process, signal.SIGUSR1)  # an end that no trial takes for its own
    return ended(process)


def wait_for_steps(folder, steps, process):
    """Wait until a run has taken so many steps, or has ended."""
    path = folder / "metrics.jsonl"
    while not is_over(process) and not (path.exists() and path.read_text().count("\n") >= steps):
        time.sleep(0.005)


def trained_files(folder):
    """{name: bytes} of the newest files of trained tensors in a run's folder, and of each epoch."""
    return {path.name: path.read_bytes() for path in folder.glob("*.*") if path.suffix in (".safetensors", ".pth")}
