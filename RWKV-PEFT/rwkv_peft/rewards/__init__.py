"""Rewards of sampled completions: by the right answer of a row, by their form, by functions of the user's."""

from typing import NamedTuple

from ..environments.environments import Environments
from .rewards import Judged, Rewards

__all__ = ["Judged", "Judges", "Rewards"]


class Judges(NamedTuple):
    """What completions are judged by: rewards and environments, each None if a run has none."""

    rewards: Rewards | None = None
    environments: Environments | None = None
