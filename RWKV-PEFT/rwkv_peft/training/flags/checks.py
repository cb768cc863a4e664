"""Find contradictions among settings beyond the table of rules: in numbers, folders, packages and the base."""

import argparse
import importlib.util
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ...checkpoints.readable import home_meant
from ...cli.errors import UNREADABLE, UserError
from ...cli.installing import how_to_install
from ...cli.names import METRICS, STATE, TRACKERS, generation
from ...cli.parser import counted
from ...config import AdapterConfig, DataConfig, ModelConfig, Objective, TrainConfig
from ...objectives import takers_of
from ..ranks.world import World
from ..saving.checkpoints import ANSWERS, TRAINED
from .parser import DIMENSIONS

if TYPE_CHECKING:
    from ...checkpoints.base import Base

# of optimizers that others have written
PACKAGES = MappingProxyType({"adamw8bit": "bitsandbytes"})
MOST_TOKENS = 2**31 - 1  # in a micro batch, because kernels count them in 32 bits
DRAWN = -1  # the value of --random_seed for a drawn one


def check_tokens(data: DataConfig) -> Iterator[str]:
    """Yield refusals of too many tokens in a micro batch, of prompts without room, and of shares not one a file."""
    if data.mix and len(data.mix) != 1 + len(data.more):
        yield (
            f"--data_mix {' '.join(f'{share:g}' for share in data.mix)}: {counted(len(data.mix), 'share')} of "
            f"{counted(1 + len(data.more), 'file')} of --data_file; give one for each"
        )
    # A preference row has two documents, so that a micro batch holds twice the tokens.
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
    package = PACKAGES.get(train.optim)
    if package and importlib.util.find_spec(package) is None:
        yield f"--optim {train.optim} needs the package {package}; {how_to_install('optim')}"
    if train.uses_zero and importlib.util.find_spec("deepspeed") is None:
        counts = {"--devices": train.devices, "--num_nodes": train.num_nodes}
        sharing = [f"{flag} {count}" for flag, count in counts.items() if count > 1]
        if train.stage == 3 or train.offload:
            sharing.append(f"--strategy {train.strategy}")
        asked = " ".join(sharing)
        remedy = how_to_install() if sys.platform == "linux" else "run it on Linux, the only system that has it"
        yield f"{asked} needs DeepSpeed; {remedy}, or train on one device without {asked}"
    for tracker in TRACKERS:
        if (project := getattr(train, tracker)) and importlib.util.find_spec(tracker) is None:
            yield f"--{tracker} {project} needs the {tracker} package: pip install {tracker}"
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


def check_overwriting(
    adapter: AdapterConfig, data: DataConfig, train: TrainConfig, objective: Objective
) -> Iterator[str]:
    """Yield a refusal for each file to read that has, in --proj_dir, a name under which runs write. A save would
    replace it: the adapter in it would then be merged twice. A run that begins anew would delete it."""
    folder = Path(train.proj_dir)
    models = (train.load_model, train.state_load, adapter.load, adapter.init)
    teacher = (objective.teacher,)
    rows = (*data.files, train.val_data, *train.more_val, train.retain_data, train.eval_data)
    # By real paths: a link or another spelling names the same file.
    sources = {os.path.realpath(path): path for path in (*models, *teacher, *rows) if path}
    for name in os.listdir(folder) if folder.is_dir() else ():
        written = TRAINED.fullmatch(name) or name in (METRICS, ANSWERS)
        if written and (source := sources.get(os.path.realpath(folder / name))):
            yield (
                f"{source} is to be read, and --proj_dir {folder} is where this run writes its own {name}; move "
                "it elsewhere, or name another folder"
            )


def check_base(args: argparse.Namespace, base: "Base") -> Iterator[str]:
    """Yield refusals of flags that contradict the base: its generation, its dimensions."""
    if args.model_version not in (None, base.config.version):
        yield (
            f"--model_version {args.model_version} ({generation(args.model_version)}) contradicts "
            f"{args.load_model}, which is {base.family.name} ({base.config.version}); leave the flag (--generation) out"
        )
    for name, _ in DIMENSIONS:
        asked, real = getattr(args, name), getattr(base.config, name)
        if asked and asked != real:
            yield f"--{name} {asked} contradicts {args.load_model}, which has {real}; leave the flag out"


def check_model(train: TrainConfig, model: ModelConfig) -> Iterator[str]:
    """Yield the refusal of a model with states that grow, if they are to be handed on."""
    from ...models.state import grows

    if grows(model) and (train.chunk_ctx or train.context_parallel > 1):
        flag = "--train_type infctx" if train.chunk_ctx else f"--context_parallel {train.context_parallel}"
        yield (
            f"{flag} hands on states of one size, and those of {generation(model.version)} grow with the "
            "tokens; leave it out"
        )


def check_tuned_states(base: "Base", adapter: AdapterConfig, data: DataConfig, objective: Objective) -> Iterator[str]:
    """Yield refusals of a base that holds tuned time states."""
    from ...models.layout import state_parts_flag

    name = base.path
    if STATE not in adapter.train_parts:
        yield (
            f"{name} holds tuned time states, which training does not carry on unless they train; add "
            f"--train_parts state{state_parts_flag(base.tensors)}, or take the model without them"
        )
    elif data.of_contexts and not objective.teacher:
        yield (
            f"{name} holds tuned time states, which train here, so that as its own teacher it would begin "
            "without them; name it as --teacher_model too"
        )
    elif objective.asks_base:
        yield (
            f"{name} holds tuned time states, which train here, and --kl_to_base reads the base without them; leave it "
            "out"
        )


def draw_seed(state: Mapping[str, Any], world: World) -> int:
    """Return the seed of a command with --random_seed -1: the run's own by the state.json that it goes on from, else a
    new one. Raises UserError if several processes of a World would each draw another."""
    with suppress(*UNREADABLE):  # it begins, or the resume itself says what is wrong with the checkpoint
        return int(state["config"]["train"]["random_seed"])
    if world.nodes > 1 or not world.launches:
        raise UserError(
            f"--random_seed {DRAWN} draws a seed, and each of the processes that are started here would draw another; "
            "give a number"
        )
    return secrets.randbelow(2**31)
