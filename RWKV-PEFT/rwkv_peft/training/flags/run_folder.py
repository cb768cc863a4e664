"""Refuse a run's folder in which something else has the name of a file or folder of the run's."""

import os
import secrets
import stat
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from ...checkpoints.lock import LOCK
from ...cli.errors import UNREADABLE, UserError
from ...cli.names import CARD, METRICS, PICTURE, RUN
from ...config import AdapterConfig, DataConfig, Objective, TrainConfig
from ..saving.checkpoints import ANSWERS, CHECKPOINTS, LM_EVAL, ROWS, TRAINED, UNSAVED, saved_state
from .world import World

LOGS = "tensorboard"
FILES = (METRICS, RUN, ANSWERS, LM_EVAL, ROWS, PICTURE, CARD, UNSAVED, LOCK)
FOLDERS = (CHECKPOINTS, LOGS, "wandb", "swanlab")
OTHERS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder, and a file is due"),
    (stat.S_ISREG, "a file, and a folder is due"),
)

DRAWN = -1  # the value that asks for a drawn seed


def check_run_folder(folder: Path) -> None:
    """Raise UserError if `folder` holds a folder, a pipe or a device by the name of a run's file, or a file by the name
    of a run's folder. Links are followed: a run's checkpoints may lie on another disk."""
    for entry in entries_of(folder):
        if entry.name in FOLDERS:
            require(entry, stat.S_ISDIR)
        elif entry.name in FILES or TRAINED.fullmatch(entry.name):
            require(entry, stat.S_ISREG)


def require(entry: "os.DirEntry[str]", due: Callable[[int], bool]) -> None:
    """Raise UserError unless an entry of a folder is, or leads to, a file (stat.S_ISREG) or a folder (stat.S_ISDIR) as
    due."""
    try:
        mode = entry.stat().st_mode
    except FileNotFoundError:  # another rank has removed it meanwhile, or it is a link to a file that will be made
        if due is stat.S_ISREG or not entry.is_symlink():
            return
        raise UserError(f"{entry.path} is a link to a folder that is not there; make it, or remove the link") from None
    if not due(mode):
        what = next((words for is_kind, words in OTHERS if is_kind(mode)), "a device")
        raise UserError(f"{entry.path} is {what}; move it away, or name another --proj_dir")


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
    if world.nodes > 1 or not world.launches:
        raise UserError(
            f"--random_seed {DRAWN} draws a seed, and each of the processes that are started here would draw another; "
            "give a number"
        )
    return secrets.randbelow(2**31)


def check_overwriting(
    adapter: AdapterConfig, data: DataConfig, train: TrainConfig, objective: Objective
) -> Iterator[str]:
    """Yield a refusal for each file to read that has, in --proj_dir, a name under which runs write. A save would
    replace it, and the adapter in it would then be merged twice; a run that begins anew would delete it."""
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
