"""The writers of faults.py, killed at random moments and at each file operation, two at once, and on a full disk."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass

import torch
from fault_processes import REFUSED, content, ended, shown, started

from rwkv_peft.data import preprocess
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.errors import UserError
from rwkv_peft.files.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.files.base import open_base, save_model
from rwkv_peft.models import family_named
from rwkv_peft.release import convert, merge_command

LAYER = "blocks.0.att.key"


@dataclass(frozen=True)
class Writer:
    """write(inputs, which, output) writes version `which` ("old" or "new") of its output into the folder `output`."""

    name: str
    write: object
    may_refuse: bool = False  # whether a kill may leave a set that its reader refuses


def save_trained(inputs, which, output):
    base = open_base(inputs / f"{which}.pth")
    save_adapter(
        output / "a.safetensors", {f"{LAYER}.weight": base.tensors[f"{LAYER}.weight"]}, AdapterMetadata("none")
    )


def save_base(inputs, which, output):
    save_model(output / "model.pth", open_base(inputs / f"{which}.pth").tensors)


def merge(inputs, which, output):
    flags = ["--base_model", inputs / f"{which}.pth", "--bone_checkpoint", inputs / "a.safetensors", "--any_base"]
    merge_command.main([*map(str, flags), "--output", str(output / "merged.pth")])


def convert_to_st(inputs, which, output):
    convert.main([str(inputs / f"{which}.pth"), str(output / "model.st")])


def make_tokens(inputs, which, output, *flags):
    words = ["--tokenizer", "bytes", "--workers", "1", "--overwrite", *flags]
    preprocess.main([str(inputs / f"{which}.jsonl"), "--output", str(output / "data"), *words])


def make_shuffled(inputs, which, output):
    make_tokens(inputs, which, output, "--shuffle", "1")


WRITERS = (
    Writer("save an adapter", save_trained),
    Writer("save a model", save_base),
    Writer("merge", merge),
    Writer("convert", convert_to_st),
    Writer("preprocess", make_tokens, may_refuse=True),
    Writer("preprocess --shuffle", make_shuffled, may_refuse=True),
)


def make_inputs(folder):
    """Make two versions, of equal sizes, of the writers' inputs."""
    family = family_named("x060")
    for seed, which in enumerate(("old", "new")):
        torch.manual_seed(seed)
        model = family.build(family.new_dimensions(2, 64, 4000))
        family.init_weights(model)
        save_model(folder / f"{which}.pth", model.state_dict())
        rows = "".join(f'{{"query": "{which} {i:05}", "response": "{i:05}"}}\n' for i in range(4000))
        (folder / f"{which}.jsonl").write_text(rows)
    torch.manual_seed(2)
    bone = {f"{LAYER}.bone": torch.randn(8, 8, 8)}
    save_adapter(folder / "a.safetensors", bone, AdapterMetadata("bat-in", rank=8))


class Trials:
    """Runs of one Writer in a folder of its own, and the two outputs that it may leave there."""

    def __init__(self, writer, inputs, folder, rng):
        self.writer, self.inputs, self.rng = writer, inputs, rng
        self.output = folder / "output"
        self.wanted, self.faults, self.left, self.seconds = {}, [], 0, 0.0
        for which in ("old", "new"):
            self.renew()
            began = time.perf_counter()
            assert ended(self.started(which)) == 0
            self.seconds = time.perf_counter() - began
            self.wanted[which] = content(self.output)

    def renew(self):
        """Make the output folder as before a trial: with the old output, if that is known."""
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir(parents=True)
        for name, data in self.wanted.get("old", {}).items():
            (self.output / name).write_bytes(data)

    def started(self, which, operation=0):
        folder = self.output
        return started(self.writer.write, self.inputs, which, folder, operation=operation, folder=folder)

    def expect(self, holds, what):
        if not holds:
            self.faults.append(f"{self.writer.name}: {what}")

    def is_whole(self, files):
        """True if the files are one of the outputs, or a set that its reader refuses."""
        if files in self.wanted.values():
            return True
        try:
            BinidxDataset(self.output / "data")
        except UserError:
            return self.writer.may_refuse
        return False

    def kill(self):
        """Kill it at a random moment -> True if it was still at work then."""
        self.renew()
        process = self.started("new")
        time.sleep(self.rng.uniform(0, 0.8 * self.seconds))
        os.kill(process, signal.SIGKILL)
        return self.killed(process)

    def kill_at(self, operation):
        """Kill it before its `operation`-th file operation -> True if it got so far."""
        self.renew()
        return self.killed(self.started("new", operation))

    def killed(self, process):
        """Judge a process's files, and the output of the next one -> True if it ended by SIGKILL."""
        killed = ended(process) == -signal.SIGKILL
        files = content(self.output)
        self.left += files != shown(files)
        self.expect(self.is_whole(shown(files)), "a kill left neither the old output nor the new one")
        self.expect(ended(self.started("new")) == 0, "the next writer failed")
        self.expect(content(self.output) == self.wanted["new"], "the next writer left something else")
        return killed

    def kill_at_operations(self, every):
        """The same at each `every`-th of its file operations -> their number."""
        return sum(1 for _ in itertools.takewhile(self.kill_at, itertools.count(1, every)))

    def race(self):
        self.renew()
        codes = [ended(process) for process in [self.started(which) for which in ("old", "new")]]
        self.expect(0 in codes and set(codes) <= {0, REFUSED}, f"of two at once the exit codes were {codes}")
        self.expect(content(self.output) in self.wanted.values(), "two at once left what neither wrote")

    def fill(self, mount):
        """Let it write over an old output on a full disk."""
        place, self.output = self.output, mount / "output"
        self.renew()
        with open(mount / "rest", "wb", buffering=0) as file, contextlib.suppress(OSError):  # until it is full
            while True:
                file.write(bytes(4096))
        code = ended(self.started("new"))
        self.expect(code == REFUSED, f"on a full disk the exit code was {code}")
        self.expect(content(self.output) == self.wanted["old"], "on a full disk something else was left")
        (mount / "rest").unlink()
        shutil.rmtree(self.output)
        self.output = place


def mounted(folder):
    """Make `folder`, and mount a small tmpfs there -> True if that worked."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
