"""Find contradictions among settings beyond the table of rules: in numbers, folders and packages."""

import argparse
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

from ...checkpoints.readable import home_meant
from ...cli.installing import how_to_install
from ...cli.parser import counted
from ...config import SCHEDULE_FREE, DataConfig, Objective, TrainConfig
from ...objectives import takers_of
from ..saving.trackers import check_trackers

# of optimizers that others have written
PACKAGES = MappingProxyType({"adamw8bit": "bitsandbytes", "lion": "lion_pytorch", SCHEDULE_FREE: "schedulefree"})
MOST_TOKENS = 2**31 - 1  # in a micro batch, because kernels count them in 32 bits


def check_tokens(data: DataConfig) -> Iterator[str]:
    """Yield refusals of too many tokens in a micro batch, of prompts without room, and of shares not one a file."""
    if data.mix and len(data.mix) != 1 + len(data.more):
        yield (
            f"--data_mix {' '.join(f'{share:g}' for share in data.mix)}: {counted(len(data.mix), 'share')} of "
            f"{counted(1 + len(data.more), 'file')} of --data_file; give one for each"
        )
    tokens = data.micro_bsz * data.ctx_len * data.documents
    if tokens > MOST_TOKENS:
        yield (
            f"--micro_bsz {data.micro_bsz} rows of --ctx_len {data.ctx_len} are {tokens:,} tokens, and a "
            f"micro batch has {MOST_TOKENS:,} at most; lower one of them"
        )
    if data.longest < 1:
        yield (
            f"--max_completion_length {data.max_completion_length} leaves nothing of --ctx_len {data.ctx_len} for a "
            "prompt; lower it, or raise --ctx_len"
        )


def check_train(train: TrainConfig) -> Iterator[str]:
    """Yield refusals of epochs, folders and packages that a run could not use."""
    if train.epoch_begin >= train.epoch_count:
        yield (f"--epoch_begin {train.epoch_begin} leaves no epoch of --epoch_count {train.epoch_count} to train")
    if train.ranks % train.context_parallel:
        yield (
            f"--context_parallel {train.context_parallel} groups ranks by so many, and there are {train.ranks} "
            "(--devices times --num_nodes); give a number that divides it"
        )
    tasks = train.lm_eval_include_path
    if train.lm_eval and tasks and not Path(tasks).is_dir():
        yield f"--lm_eval_include_path {tasks} is no folder; name the one that the tasks' .yaml lie in"
    if train.lm_eval and importlib.util.find_spec("lm_eval") is None:
        yield f"--lm_eval {' '.join(train.lm_eval)} needs the package lm_eval; {how_to_install('eval')}"
    package = PACKAGES.get(train.optim)
    if package and importlib.util.find_spec(package) is None:
        yield f"--optim {train.optim} needs the package {package}; {how_to_install('optim')}"
    yield from check_trackers(train)
    if not train.proj_dir:
        yield "--proj_dir is empty; name the folder of the run"
        return
    folder = Path(train.proj_dir)
    if meant := home_meant(folder):
        yield f"--proj_dir {folder}: {meant}"
    if folder.exists() and not folder.is_dir():
        yield f"--proj_dir {folder} is a file; name a folder"


def check_objective(args: argparse.Namespace, objective: Objective) -> Iterator[str]:
    """Yield the refusal of data that the objective does not learn from."""
    if args.data_type not in objective.rows:
        yield (
            f"--objective {objective.name} learns from --data_type {' or '.join(objective.rows)}, and the data is "
            f"{args.data_type}; give such data, or --objective {' or '.join(takers_of(args.data_type))}"
        )
