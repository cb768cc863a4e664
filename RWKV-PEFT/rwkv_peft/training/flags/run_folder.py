"""Refuse a run's folder in which an entry that the run reads or writes is not a plain file or folder of its own, or is
to be read. A link would lead writes elsewhere, a pipe would be waited for, and a device has no end."""

import os
import secrets
import stat
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ...config import AdapterConfig, DataConfig, Objective, TrainConfig
from ...errors import UNREADABLE, UserError
from ...files.lock import LOCK
from ...names import CARD, METRICS, PICTURE, RUN
from ..saving.checkpoints import ANSWERS, CHECKPOINTS, HIDDEN, LM_EVAL, ROWS, TRAINED, UNSAVED, saved_state
from .world import World

LOGS = "tensorboard"
FILES = (METRICS, RUN, ANSWERS, LM_EVAL, ROWS, PICTURE, CARD, UNSAVED, LOCK)
FOLDERS = (CHECKPOINTS, LOGS, "wandb", "swanlab")
STEP = ("step-", HIDDEN)  # how the name of a checkpoint's folder begins
OTHERS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder, and a file is due"),
    (stat.S_ISREG, "a file, and a folder is due"),
)

DRAWN = -1  # the value that asks for a drawn seed


def check_run_folder(folder: Path) -> None:
    """Raise UserError if a run that begins or goes on in `folder` would read or write anything but files inside it."""
    for entry in entries_of(folder):
        if entry.name in FOLDERS:
            require(entry, stat.S_ISDIR)
        elif entry.name in FILES or TRAINED.fullmatch(entry.name):
            require(entry, stat.S_ISREG)
    for below in (CHECKPOINTS, LOGS):
        for entry in entries_below(folder / below):
            is_step = Path(entry.path).parent.name == CHECKPOINTS and entry.name.startswith(STEP)
            require(entry, stat.S_ISDIR if is_step or entry.is_dir(follow_symlinks=False) else stat.S_ISREG)


def require(entry: "os.DirEntry[str]", due: object, flag: str = "--proj_dir") -> None:
    """Raise UserError unless an entry of a folder, given as `flag`, is of the kind that is due, stat.S_ISREG or
    stat.S_ISDIR."""
    try:
        mode = entry.stat(follow_symlinks=False).st_mode
    except FileNotFoundError:  # another rank has removed it meanwhile
        return
    kind = stat.S_ISDIR if stat.S_ISDIR(mode) else stat.S_ISREG if stat.S_ISREG(mode) else None
    if kind is not due:
        what = next((words for is_kind, words in OTHERS if is_kind(mode)), "a device")
        raise UserError(
            f"{entry.path} is {what}: a run reads and writes nothing but files and folders inside its {flag}; move it "
            "away, or name another folder"
        )


def entries_below(folder: Path) -> Iterator["os.DirEntry[str]"]:
    """Yield the entries of a folder and of all folders in it; links are not followed."""
    for entry in entries_of(folder):
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from entries_below(Path(entry.path))


def entries_of(folder: Path) -> list["os.DirEntry[str]"]:
    """The entries of a folder. [] if it is not there, because another rank may make and remove it at any moment, or if
    it cannot be read, which is refused when it is to be written."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def draw_seed(args: Namespace, world: World) -> int:
    """Return the seed of a command with --random_seed -1: the run's own if it resumes, else a new one. Raises UserError
    if several processes of a World would each draw another."""
    with suppress(*UNREADABLE):  # it begins, or the resume itself says what is wrong with the checkpoint
        return int(saved_state(args.proj_dir, args.resume)["config"]["train"]["random_seed"])
    if world.nodes > 1 or not world.starts:
        raise UserError(
            f"--random_seed {DRAWN} draws a seed, and each of the processes that are started here would draw another; "
            "give a number"
        )
    return secrets.randbelow(2**31)


def check_overwriting(
    adapter: AdapterConfig, data: DataConfig, train: TrainConfig, objective: Objective
) -> Iterator[str]:
    """Yield a refusal for each file to read that has, in --proj_dir, a name under which runs write. A save would
    replace it, and what was merged into it would then be merged twice; a run that begins anew would delete it."""
    folder = Path(train.proj_dir)
    models = (train.load_model, train.state_load, adapter.load, adapter.init)
    teacher = (objective.teacher, objective.stored, *objective.teacher_adapters, objective.teacher_state)
    rows = (data.path, *data.more, train.val_data, *train.more_val, train.retain_data, train.eval_data)
    sources = {os.path.realpath(path): path for path in (*models, *teacher, *rows) if path}
    for name in (entry.name for entry in entries_of(folder)):
        written = TRAINED.fullmatch(name) or name in (METRICS, ANSWERS, LM_EVAL)
        if written and (source := sources.get(os.path.realpath(folder / name))):
            yield (
                f"{source} is to be read, and --proj_dir {folder} is where this run writes its own {name}; move "
                "it elsewhere, or name another folder"
            )
