"""Reads and writes files of time states in every layout, for generation, training and the checks.

- .pth: {blocks.N.att.time_state: (H, N value, N key)}, as RWKV-Runner and ChatRWKV read them; --state_parts shift and
  a saved session add the shifts (C), for which other programs have no place
- .st, .state, .safetensors: time_state with the last two axes exchanged, as web-rwkv and Ai00 have them
- the adapter.safetensors of a run that tuned only states, or the run's folder: as .pth, and it names its base
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..cli.errors import UserError
from ..cli.names import NONE
from ..models import family_named
from ..models.layout import state_parts
from ..models.state import State, is_time_state, state_of, swapped
from .adapter_file import METADATA_KEY, AdapterMetadata, read_own
from .adapters import adapter_of_run
from .atomic import atomic_write
from .base import Base, save_model
from .rwkv_peft_file import unwrapped
from .tensors import read_safetensors, read_tensors, save_safetensors

WEB = (".st", ".state", ".safetensors")


class StateFile(NamedTuple):
    """A file of states: its path, {key: tensor} as in a .pth, and metadata, which may name the base."""

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: AdapterMetadata = AdapterMetadata(NONE)

    def check_generation(self, version: str) -> None:
        """Raise UserError if the states name another generation than a model's version."""
        if self.metadata.generation not in ("", version):
            theirs, ours = (family_named(name).name for name in (self.metadata.generation, version))
            raise UserError(f"{self.path} was tuned on an {theirs}, and the model is an {ours}; give its own base")

    def check_base(self, base: Base) -> None:
        """Raise UserError if the states name another base."""
        remedy = "find the base it was tuned on, or give the state.pth beside it, which names none"
        self.metadata.require_base(self.path, base, remedy)

    def time_states(self) -> dict[str, torch.Tensor]:
        """The file's {key: tensor}. Raises UserError for a saved session with fields that cannot be tuned."""
        if fixed := [key for key in self.tensors if not is_time_state(key)]:
            raise UserError(
                f"{self.path} is a saved session, and its {fixed[0]} cannot be tuned; give time states, as state "
                "tuning makes them"
            )
        return self.tensors

    def added_to(self, base: Base) -> Base:
        """A Base with these time states in place of its own. Raises UserError if they do not fit the model."""
        state_of(self.time_states(), State.zeros(base.config, 1), base.family.rows_are_keys, self.path)
        return Base(base.path, base.tensors | self.tensors, base.family, base.config)


def is_own(path: str | Path) -> bool:
    """Return whether a file is an adapter that train.py saved."""
    return Path(path).suffix == ".safetensors" and METADATA_KEY in read_safetensors(path)[1]


def read_states(path: str | Path) -> StateFile:
    """Read the StateFile at path."""
    path = adapter_of_run(path, tell=True)
    if is_own(path):
        adapter = read_own(path)
        others = [key for key in adapter.tensors if not is_time_state(key)]
        if others:
            raise UserError(
                f"{path} holds {len(others)} tensors that are no time states (such as {others[0]}); merge it, or give "
                "the state.pth beside it"
            )
        return StateFile(path, adapter.tensors, adapter.metadata)
    if path.suffix in WEB:
        return StateFile(path, swapped_states(read_safetensors(path)[0]))
    return StateFile(path, unwrapped(read_tensors(path)))


def check_state_output(flag: str, path: str | Path) -> None:
    """Raise UserError unless a flag's path ends as a file of time states does."""
    if Path(path).suffix not in (".pth", *WEB):
        raise UserError(f"{flag} {path}: a name that ends in .pth, or in {', '.join(WEB)} (web-rwkv, Ai00), is due")


def check_session_output(flag: str, path: str | Path) -> None:
    """Raise UserError if a flag's path has an ending of web-rwkv's layout, because a session would be read as such."""
    if Path(path).suffix in WEB:
        raise UserError(
            f"{flag} {path}: a session is a .pth, and would be read as another file by this name; end it so"
        )


def require_place(path: str | Path, keys: Iterable[str]) -> None:
    """Raise UserError if the layout that the path's ending names has no place for one of some keys of time states."""
    if Path(path).suffix in WEB and "shift" in state_parts(keys):
        raise UserError(
            f"{path}: web-rwkv and Ai00 start from wkv states alone, and these have shifts (--state_parts); name a "
            ".pth, which rwkv-peft reads, or tune --state_parts wkv"
        )


def write_states(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write {key: time state} in the layout that the path's ending names, atomically. Raises UserError for shifts in
    web-rwkv's layout."""
    require_place(path, tensors)
    if Path(path).suffix == ".pth":
        return save_model(path, tensors)
    with atomic_write(path) as temporary:
        save_safetensors(temporary, swapped_states(tensors))


def swapped_states(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{key: time state} in a .pth's layout -> in web-rwkv's and Ai00's, or the other way round."""
    return {key: swapped(tensor) if tensor.dim() > 1 else tensor for key, tensor in tensors.items()}
