"""Reads the loss weights of rows and turns: a row's field "weight", and a turn's "weight" of 0 or 1, or "train"."""

import math
from collections.abc import Mapping
from typing import Any

from ..errors import UserError, short

WEIGHT, TRAIN = "weight", "train"
OF_TOKENS = ("preprocess", "train")  # the commands of encoding.REMEDIES whose rows may weigh


def weight_of(row: object, command: str) -> float:
    """Return the weight of a row: its WEIGHT, or 1. Raises UserError for anything but a number from 0 on, and if
    the loss of the command's rows has no weights."""
    found = row.get(WEIGHT) if isinstance(row, dict) else None
    if found is None or found == "":
        return 1.0
    try:
        weight = float(found)
    except (TypeError, ValueError):
        weight = math.nan
    said, rename = f"field {WEIGHT!r} holds {short(repr(found))}", "rename the field if it means something else"
    if isinstance(found, bool) or not 0 <= weight < math.inf:
        raise UserError(f"{said}; a row's weight in the loss is a number from 0 on; {rename}")
    if weight != 1 and command not in OF_TOKENS:
        raise UserError(f"{said}, and only rows of --data_type sft weigh in the loss; leave it out, or {rename}")
    return weight


def is_learned(turn: Mapping[str, Any]) -> bool:
    """Return whether an answer counts: not if its WEIGHT is 0, as in OpenAI's rows, or its TRAIN false. Raises
    UserError for other values, because only whole rows have other weights."""
    for name in (WEIGHT, TRAIN):
        found = turn.get(name)
        if found not in (None, 0, 1):
            raise UserError(
                f"field {name!r} of a turn holds {short(repr(found))}; 0 leaves its words out of the loss, and 1 does "
                "not; any other weight is for the whole row, beside its turns"
            )
        if found is not None and not found:
            return False
    return True
