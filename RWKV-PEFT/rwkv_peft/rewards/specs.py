"""Reads what --reward names."""

from ..errors import UserError
from ..tables import WRITTEN
from .forms import Match, Schema
from .functions import FunctionReward
from .reward import Reward
from .tasks import ChoicesReward, TaskReward

KINDS = (
    f"a task ({', '.join(WRITTEN)}, choices; gsm8k:flexible names its measure), match:REGEX, json:SCHEMA.json or "
    "FILE.py:FUNCTION"
)


def reward_of(spec: str) -> Reward:
    """Make the Reward that a word of --reward names. Raises UserError, without the word, if it names none."""
    kind, _, rest = spec.partition(":")
    file, _, function = spec.rpartition(":")
    if kind in WRITTEN:
        return TaskReward(kind, rest)
    if spec == ChoicesReward.name:
        return ChoicesReward()
    if kind == "match" and rest:
        return Match(rest)
    if kind == "json" and rest:
        return Schema(rest)
    if file.endswith(".py") and function.isidentifier():
        return FunctionReward(file, function)
    raise UserError(f"rewards are {KINDS}")
