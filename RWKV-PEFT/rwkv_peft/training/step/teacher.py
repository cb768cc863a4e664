"""The teacher of a run: another model, frozen, in the run's precision and whole on every device."""

from typing import NamedTuple

import torch

from ...checkpoints.adapters import read_adapter
from ...checkpoints.base import Base, base_of, open_base
from ...checkpoints.state_file import read_states
from ...checkpoints.tensors import DTYPES
from ...cli.errors import UserError
from ...config import Objective, RunConfig
from ...data.recorded import Vocabulary, recorded_beside
from ...models.parts import LanguageModel
from ...models.state import State, split_time_states, state_of
from ...release.merge import check_fingerprints, merged_tensors


class Teacher(NamedTuple):
    """A teacher's file, and the model of it."""

    base: Base
    model: LanguageModel


def open_teacher(objective: Objective, vocab_size: int) -> Base | None:
    """Open the teacher that an objective names, with its adapters and states, None if it names none. Raises
    UserError as opening and merging do, and for another vocabulary than the student's."""
    if not objective.teacher:
        return None
    teacher = open_base(objective.teacher)
    if teacher.config.vocab_size != vocab_size:
        raise UserError(
            f"--teacher_model {teacher.path} has a vocabulary of {teacher.config.vocab_size:,} tokens, and its student "
            f"{vocab_size:,}; a teacher speaks of the same tokens: name another"
        )
    if objective.teacher_adapters:
        named = [(path, read_adapter(path, teacher.tensors)) for path in objective.teacher_adapters]
        check_fingerprints(teacher, named)
        teacher = base_of(merged_tensors(teacher, named), teacher.path)
    if objective.teacher_state:
        states = read_states(objective.teacher_state)
        states.check_generation(teacher.config.version)
        teacher = states.added_to(teacher)
    return teacher


def require_own_tokens(teacher: Base, data: Vocabulary | None) -> None:
    """Raise UserError if a run recorded beside the teacher that its tokens are others than the data's."""
    own = recorded_beside(teacher.path)
    if own is not None and data is not None and own.hash != data.hash:
        raise UserError(
            f"--teacher_model {teacher.path} was trained with {own}, and the data was made with {data}, so that one "
            "number is another text to it; name a teacher of the data's tokenizer"
        )


def make_teacher(base: Base, config: RunConfig, device: torch.device) -> Teacher:
    """Make the teacher of a run; it begins each row with the time states of its file, if there are any."""
    model: LanguageModel = base.family.load(base.tensors, base.config).requires_grad_(False)
    model.settle()
    model.to(DTYPES[config.train.precision])
    states = split_time_states(base.tensors)[1]
    if states:
        zeros = State.zeros(base.config, 1)
        model.tune_states(state_of(states, zeros, base.family.rows_are_keys, base.path))
    model.requires_grad_(False).eval().to(device)
    return Teacher(base, model)
