"""Place tuned time states in a merge: in the merged model, or in a file of their own (merge_bone.py --state_output)."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from ..errors import UserError
from ..files.atomic import check_output, same_file
from ..files.base import Base
from ..files.state_file import check_state_output, read_states
from ..models.state import is_time_state
from .merge import Merge


def check_separate(
    path: str | Path, output: str | Path | None, merge: Merge, inputs: Iterable[tuple[str, str]]
) -> None:
    """Raise UserError if --state_output cannot be written, is --output, or would leave nothing for one of the two
    files."""
    check_state_output("--state_output", path)
    check_output("--state_output", path, list(inputs))
    if output is not None and same_file(path, output):
        raise UserError(f"--state_output and --output are both {path}; give each a file of its own")
    if not any(map(is_time_state, merge.specs)):
        raise UserError(f"--state_output {path}: neither the base nor an adapter holds time states; leave it out")
    if all(map(is_time_state, merge.changes)):
        raise UserError(
            f"--state_output {path}: time states are all that the adapters change, so that --output would be the base; "
            "make a file of the states with `rwkv-peft convert`"
        )


def diverted(
    bands: Iterable[tuple[str, torch.Tensor]], states: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a merge's (key, rows) without time states, which are gathered in `states`."""
    for key, rows in bands:
        if not is_time_state(key):
            yield key, rows
        else:
            states[key] = torch.cat([states[key], rows]) if key in states else rows


def check_written(path: str | Path, states: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError unless the file of states at path reads back as `states`."""
    found = read_states(path).tensors
    if found.keys() != states.keys() or not all(torch.equal(found[key], states[key]) for key in states):
        raise UserError(
            f"{path} does not read back as it was computed; the disk or the memory is faulty, do not use it"
        )


def note_inside(base: Base) -> str:
    """Write a note for users about time states inside a merged model."""
    note = "RWKV-Runner, web-rwkv and Ai00 take states as files of their own: --state_output writes one"
    if not base.family.states_in_model:
        note = f"the rwkv package does not look for them in an {base.family.name} file; {note}"
    return f"states   in the model's file; {note}"
