"""Rewards of sampled completions: by the right answer of a row, by their form, by functions of the user's."""

from .rewards import Judged, Rewards

__all__ = ["Judged", "Rewards"]
