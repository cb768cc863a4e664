"""Judges answers that a model drew: by the right one of a row, by their form, by functions of the user's."""

from .rewards import Judged, Rewards

__all__ = ["Judged", "Rewards"]
