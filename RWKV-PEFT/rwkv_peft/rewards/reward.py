"""The interface of a reward: it gives answers numbers, and says what a row must have for that."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

WORDS = 60  # the most characters of a prompt that a message quotes


class Answer(NamedTuple):
    """An answer to judge: the prompt as the model read it, what the model wrote, and the row that the prompt is of."""

    prompt: str
    completion: str
    row: Mapping[str, Any]


class Reward(ABC):
    """Judges answers.

    - name: its key among the rewards of a run
    - alone: it is given one answer at a time, so that a message can name the one at which it fails
    """

    name: str
    alone: ClassVar[bool] = True

    def check(self, row: Mapping[str, Any]) -> None:  # noqa: B027  (a reward of the text alone reads no row)
        """Raise UserError for a row whose answers it cannot judge."""

    @abstractmethod
    def judge(self, answers: Sequence[Answer]) -> Sequence[object]:
        """Return a number for each answer, or None for one that it does not judge."""


def beginning(text: str) -> str:
    """Quote the first words of a text in a message."""
    words = " ".join(text.split())
    return repr(words if len(words) <= WORDS else f"{words[:WORDS]}…")
