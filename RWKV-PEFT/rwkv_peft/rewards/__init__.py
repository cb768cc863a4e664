"""Judges answers that a model drew: tasks of eval, forms that an answer must have, functions of the user's."""

from .rewards import Judged, Rewards

__all__ = ["Judged", "Rewards"]
