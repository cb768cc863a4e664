"""The teacher of a run: another model, frozen, whole on every device."""

import torch

from ...checkpoints.base import Base, open_base
from ...checkpoints.tensors import DTYPES
from ...cli.errors import UserError
from ...config import Objective, RunConfig
from ...data.recorded import Vocabulary, recorded_beside
from ...models.layout import state_parts
from ...models.parts import LanguageModel
from ...models.state import State, split_time_states, state_of


def open_teacher(objective: Objective, vocab_size: int) -> Base | None:
    """Open an objective's teacher, None if it names none. Raises UserError as opening does; also for another vocabulary
    than the student's."""
    if not objective.teacher:
        return None
    teacher = open_base(objective.teacher)
    if teacher.config.vocab_size != vocab_size:
        raise UserError(
            f"--teacher_model {teacher.path} has a vocabulary of {teacher.config.vocab_size:,} tokens, and its student "
            f"{vocab_size:,}; a teacher speaks of the same tokens: name another"
        )
    return teacher


def require_own_tokens(teacher: Base, data: Vocabulary | None) -> None:
    """Raise UserError if the teacher was trained with another tokenizer than the data's, by the run recorded beside
    it."""
    recorded = recorded_beside(teacher.path)
    if recorded is not None and data is not None and recorded.hash != data.hash:
        raise UserError(
            f"--teacher_model {teacher.path} was trained with {recorded}, and the data was made with {data}, so that "
            "one number is another text to it; name a teacher of the data's tokenizer"
        )


def make_teacher(base: Base, config: RunConfig, device: torch.device) -> LanguageModel:
    """The frozen model of a teacher in the run's precision; rows begin with the time states of its file, if any."""
    model: LanguageModel = base.family.load(base.tensors, base.config).requires_grad_(False)
    model.settle()
    model.to(DTYPES[config.train.precision])
    states = split_time_states(base.tensors)[1]
    if states:
        zeros = State.zeros(base.config, 1)
        start = state_of(states, zeros, base.family.rows_are_keys, base.path)
        model.tune_states(start, state_parts(states))
    model.requires_grad_(False).eval().to(device)
    return model
