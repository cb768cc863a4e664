"""Attacks on runs that are under way, for faults.py: files are written over, nodes read other files, comparisons are
killed, and disks are full from some block of a save on. Each run must end in one message.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from fault_disks import empty, fill
from fault_processes import REFUSED, started
from fault_ranks import start_pair
from fault_training import AGAIN, LONG, METHODS, is_over, run_command, train_unprivileged, wait, wait_for_steps
from fault_training import trained_files as trained
from fault_writers import mounted

from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.errors import UserError
from rwkv_peft.files.adapter_file import save_adapter
from rwkv_peft.files.adapters import read_adapter
from rwkv_peft.files.base import save_model
from rwkv_peft.files.lock import alone_in
from rwkv_peft.files.pth import read_tensors
from rwkv_peft.training.saving.checkpoints import UNSAVED, find_checkpoint

BONE = METHODS["bat-in"]
ENDLESS = (*BONE, "--epoch_steps", "100000", "--save_every", "5")
BLOCK = 4096  # bytes of a disk that are taken together
MINUTE = 60  # seconds in which what a comparison has started ends


def expect_message(training, name, codes, told, node=0):
    """Expect a run to have ended with one of the codes, and with one message that has the words `told`."""
    said = training.log(name, node).read_text()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    well = codes and len(errors) == 1 and told in errors[0] and "Traceback" not in said
    training.expect(well, name, f"it did not end with one message that says {told!r}")


def inputs_of(training, name):
    """(a folder with a base and data of a run's own, the flags that name them)."""
    folder = training.folder / f"{name}, inputs"
    folder.mkdir()
    shutil.copy(training.folder / "base.pth", folder)
    with ShardWriter(folder / "data", vocab_size=80) as writer:
        for number in range(300):
            writer.add([1 + (number + 7 * i) % 79 for i in range(20)], [0] * 5 + [1] * 15)
    return folder, ("--load_model", str(folder / "base.pth"), "--data_file", str(folder / "data"))


class Change(NamedTuple):
    """change(inputs, run) is made while a run goes on, which then ends by itself, or is asked to."""

    name: str
    change: Callable
    told: str
    asked: bool = False


def shorten(name, inputs, run):
    (inputs / name).write_bytes(b"")


def other_weights(inputs, run):
    path = inputs / "base.pth"
    state = {key: tensor + 1 for key, tensor in read_tensors(path).items()}
    save_model(inputs / "other" / path.name, state)  # under its name, which stands in the file, too
    content = (inputs / "other" / path.name).read_bytes()
    assert len(content) == path.stat().st_size
    overwrite(path, content)


def overwrite(path, content):
    with open(path, "r+b") as file:
        file.write(content)


def unknown_tokens(inputs, run):
    path = inputs / "data.bin"
    overwrite(path, b"\xff" * path.stat().st_size)


def replace_folder(inputs, run):
    run.rename(run.with_name(f"{run.name}, moved"))
    run.touch()


CHANGES = (
    Change("the base is shortened", functools.partial(shorten, "base.pth"), "while it is read: it has 0"),
    Change("the base holds other weights", other_weights, "while it is read: it holds other weights"),
    Change("a .bin is shortened", functools.partial(shorten, "data.bin"), "while it is read: it has 0"),
    Change("an .idx is shortened", functools.partial(shorten, "data.idx"), "while it is read: it has 0"),
    Change("a .bin holds unknown tokens", unknown_tokens, "token 65535 at position"),
    Change("a file in place of --proj_dir", replace_folder, "cannot write", asked=True),
)


def change_and_end(training, case, number):
    """Change a file of a run that is under way; -> whether that met it at work."""
    name = f"{case.name}, {number}"
    inputs, flags = inputs_of(training, name)
    run = training.folder / name
    process = training.start(name, *ENDLESS, *flags)
    wait_for_steps(run, 8 + number, process)
    time.sleep(training.rng.uniform(0, 0.2))
    met = not is_over(process)
    case.change(inputs, run)
    if case.asked:
        os.kill(process, signal.SIGTERM)
    code = wait(process)
    expect_message(training, name, code in (1, REFUSED), case.told)  # 1 by SIGBUS, as another thread reads on
    if not case.asked:
        training.expect(training.newest_checkpoint(name) > 0, name, "no checkpoint is left")
    return met


def other_mask(folder):
    overwrite(folder / "data.mask", bytes(10))  # of which half counted


def other_document(folder):
    """One token of one document, of another that the vocabulary has."""
    tokens = np.memmap(folder / "data.bin", dtype="<u2", mode="r+")
    tokens[20 * 7 + 3] ^= 1
    tokens.flush()


def other_adapter(folder):
    adapter = read_adapter(folder / "run")
    tensors = {key: tensor + 1 for key, tensor in adapter.tensors.items()}
    save_adapter(folder / "run" / "adapter.safetensors", tensors, adapter.metadata)


def other_factors(folder):
    state = {key: tensor + 1 for key, tensor in read_tensors(folder / "init_pissa.pth").items()}
    save_model(folder / "init_pissa.pth", state)


def pissa_of(folder):
    parts = {"pissa_load": str(folder / "pissa.pth"), "pissa_init": str(folder / "init_pissa.pth"), "pissa_r": 8}
    return ("--peft", "pissa", "--pissa_config", json.dumps(parts))


# the difference between two nodes, and the flags of each, given the folder of its inputs
DIFFERENCES = MappingProxyType(
    {
        "another .mask": (other_mask, lambda folder: (*BONE, "--loss_mask", "file")),
        "one of 300 documents": (other_document, lambda folder: BONE),
        "another base": (lambda folder: other_weights(folder, None), lambda folder: BONE),
        "another bone_load": (other_adapter, lambda folder: (*BONE, "--bone_load", str(folder / "run"))),
        "another pissa_init": (other_factors, pissa_of),
    }
)


def start_otherwise(training, name):
    """Start two nodes whose inputs differ; -> True."""
    change, flags_of = DIFFERENCES[name]
    adapters = {"another bone_load": "bat-in", "another pissa_init": "pissa"}
    inputs = [inputs_of(training, f"{name}, node {node}") for node in range(2)]
    if name in adapters:
        method = adapters[name]
        training.whole(f"{method} of {name}", *METHODS[method], "--epoch_steps", "2")
        for folder, _ in inputs:
            shutil.copytree(training.folder / f"{method} of {name}", folder / "run")
            if method == "pissa":
                run_words(training, name, ["convert", str(folder / "run"), str(folder / "pissa.pth")])
    change(inputs[1][0])
    each = [(*flags_of(folder), *flags, "--epoch_steps", "4") for folder, flags in inputs]
    processes = start_pair(training, name, *each)
    codes = [wait(process) for process in processes]
    for node in range(2):
        expect_message(training, name, codes[node] == REFUSED, " disagree: ", node)
    training.expect(not (training.folder / name / "metrics.jsonl").exists(), name, "it trained")
    return True


def run_words(training, name, words):
    code = wait(started(run_command, words, training.log(name), {}))
    assert code == 0, training.log(name).read_text()


def kill_comparison(training, number):
    """Kill a comparison whose run trains; -> whether that met it at work."""
    name = f"compare, killed {number}"
    inputs, flags = inputs_of(training, name)
    words = ["compare", "--methods", "bone", "--rank", "8", "--seeds", "7", "--steps", "100000", "--rates", "1e-3"]
    words += ["--output", str(training.folder / name), "--", *flags, "--ctx_len", "16", "--accelerator", "cpu"]
    process = started(run_command, [*words, "--val_split", "0.2"], training.log(name), {})
    runs, deadline = training.folder / name / "runs", time.monotonic() + 4 * MINUTE
    while not list(runs.glob("*/metrics.jsonl")) and not is_over(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    if is_over(process):
        training.expect(False, name, "it ended before it could be killed")
        return False
    time.sleep(training.rng.uniform(0, 1))
    os.kill(process, signal.SIGKILL)
    wait(process)
    (run,) = runs.iterdir()
    deadline = time.monotonic() + MINUTE
    while trains(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    training.expect(not trains(run), name, "its training goes on for a minute")
    training.expect(find_checkpoint(run), name, "its training left no checkpoint")
    return True


def trains(run):
    with contextlib.suppress(UserError), alone_in(run):
        return False
    return True


def fill_and_resume(training, steps, share):
    """Leave of a run's disk, after some steps, a share of what a save takes, and go on once there is room again;
    -> whether that met a save."""
    flags = (*BONE, *LONG)
    unbroken, whole = training.whole("disks, unbroken", *flags), training.folder / "disks, unbroken"
    checkpoint = find_checkpoint(whole)
    took = [path.stat().st_size for path in (*checkpoint.rglob("*"), whole / "adapter.safetensors") if path.is_file()]
    room = int(share * sum(-(-size // BLOCK) + 2 for size in took)) * BLOCK
    name = f"{room >> 10} KiB are left after {steps} steps"
    folder = training.folder / name
    if not mounted(folder):
        return False
    try:
        process = training.start(name, *flags, action=train_unprivileged)
        wait_for_steps(folder, steps, process)
        os.kill(process, signal.SIGSTOP)
        before = training.newest_checkpoint(name)
        fill(folder, room)
        os.kill(process, signal.SIGCONT)
        code, files = wait(process), trained(folder)
        empty(folder)
        if code == 0:
            return False
        expect_message(training, name, code == REFUSED, "cannot write ")
        hidden = {path.name for path in folder.rglob(".*")}
        if not files:
            hidden.discard(UNSAVED)  # which lets --resume auto begin anew
        training.expect(not hidden, name, f"it left {sorted(hidden)}")
        after = training.newest_checkpoint(name)
        training.expect(after >= before, name, "the checkpoint that it had is gone")
        again = training.start(name, *flags, *AGAIN)
        if after or not files:
            training.goes_on(name, unbroken, [again])
        else:
            kept = wait(again) == REFUSED and "already holds" in training.log(name).read_text()
            training.expect(kept and trained(folder) == files, name, "trained tensors of no checkpoint are overwritten")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    return True
