"""A run of train.py whose disk fills or whose folder loses its permission, for faults.py: it must end with one message
and the checkpoint that it had, and once it may write again, resume and end like an unbroken run."""

import os
import signal
import subprocess
from collections.abc import Callable
from typing import NamedTuple

from fault_processes import REFUSED
from fault_training import AGAIN, LONG, METHODS, train_unprivileged, wait, wait_for_steps
from fault_writers import mounted

EPOCH = ("--epoch_steps", "90", "--save_every", "40")  # of numbers enough to fill what a file's last block leaves


class Case(NamedTuple):
    """Take the disk away from a run after `steps` steps, and give it back."""

    name: str
    flags: tuple
    steps: int
    take: Callable
    give: Callable
    disk: bool = False


def fill(folder, room=0):
    """Fill a disk but for so many bytes."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:  # it is full
            file.truncate(max(0, file.tell() - room))


def close(folder):
    for place in (folder, folder / "checkpoints"):
        place.chmod(0o555)


def reopen(folder):
    for place in (folder, folder / "checkpoints"):
        place.chmod(0o755)


def empty(folder):
    (folder / "filler").unlink()


CASES = (
    Case("full disk at a save", LONG, 7, fill, empty, disk=True),
    Case("full disk between saves", EPOCH, 42, fill, empty, disk=True),
    Case("lost permission", LONG, 7, close, reopen),
)


def lose_and_resume(training, case):
    """Take the disk away as the case says, and resume -> True if the run was still at work then."""
    name, folder, flags = case.name, training.folder / case.name, (*METHODS["bat-in"], *case.flags)
    unbroken = training.whole(f"{name}, unbroken", *flags)
    if case.disk and not mounted(folder):
        return False
    try:
        process = training.start(name, *flags, action=train_unprivileged)
        wait_for_steps(folder, case.steps, process)
        os.kill(process, signal.SIGSTOP)
        before = training.newest_checkpoint(name)
        case.take(folder)
        os.kill(process, signal.SIGCONT)
        code, said = wait(process), training.log(name).read_text()
        case.give(folder)
        told = code == REFUSED and "error: cannot write " in said and "Traceback" not in said
        training.expect(told, name, f"it ended with exit code {code} and not with one message")
        training.expect(training.newest_checkpoint(name) == before > 0, name, "the checkpoint that it had is gone")
        training.goes_on(name, unbroken, [training.start(name, *flags, *AGAIN)])
    finally:
        if case.disk:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    return True
