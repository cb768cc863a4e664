"""The recurrent state after a sequence, and its layouts in files and runtimes.

In the model a layer's wkv state has the axes that its generation computes with; files hold it as
`blocks.N.att.time_state` (H, N value, N key), with a row for each value. A state file has that key for every layer, as
state tuning makes it, or `blocks.N.att.shift` and `blocks.N.ffn.shift` (C), or these three (--state_parts); a saved
session holds all fields of the layers' states. web-rwkv and Ai00 swap the last two axes of time_state.

A generation's ModelConfig names the NamedTuple of a layer's state, layer_state. Its field wkv is float32 in a model of
any dtype; its methods keys() and shapes() give each field's key in files and its size. Fields of GROWING have an axis
of tokens, (B, P, …), which are the last ones of the P: a last field, length (B,) int64, which files do without, counts
them.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..cli.errors import UserError
from ..cli.names import STATE_PARTS, all_finite
from ..config import ModelConfig
from ..ops.recurrence.signature import bounds_on_host
from .layout import WKV, belongs, is_time_state, state_parts

GROWING = ("past_keys", "past_values")
DTYPES = MappingProxyType({"wkv": torch.float32, "length": torch.int64})  # of the fields that do not have the model's


class State(tuple[Any, ...]):
    """One layer_state for each layer: all that the model remembers of a sequence, in a size that does not depend on its
    length, unless fields grow."""

    @staticmethod
    def zeros(
        config: ModelConfig,
        batch: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        tokens: int = 0,
    ) -> "State":
        """The state before the first token, for `batch` sequences; config has the dimensions, dtype is the model's.
        tokens: places in the fields that grow."""
        kind = config.layer_state
        fields = [
            ((batch, *((tokens, *shape[1:]) if name in GROWING else shape)), DTYPES.get(name, dtype))
            for name, shape in zip(kind._fields, kind.shapes(config))
        ]
        return State(
            kind._make(torch.zeros(shape, device=device, dtype=dt) for shape, dt in fields)
            for _ in range(config.n_layer)
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self for tensor in layer)

    def each(self, function: Callable[[str, Tensor], Tensor]) -> "State":
        """The State of function(a field's name, the field)."""
        return State(layer._make(map(function, layer._fields, layer)) for layer in self)

    def selected(self, rows: Tensor) -> "State":
        """The State of some sequences, chosen by rows (m,) int64."""
        unfilled = 0
        if hasattr(self[0], "length") and len(rows):
            unfilled = self[0].past_keys.shape[1] - int(self[0].length[rows].max())
        return self.each(lambda name, tensor: (tensor[:, unfilled:] if name in GROWING else tensor)[rows])

    def first(self, n: int) -> "State":
        """The State of its first n sequences, in the same memory."""
        return self.each(lambda name, tensor: tensor[:n])

    def repeated(self, n: int) -> "State":
        """The State of n copies of each of its sequences, side by side."""
        return self.each(lambda name, tensor: tensor.repeat_interleave(n, 0))

    def put(self, rows: Tensor, other: "State") -> "State":
        """The State with the sequences of rows (m,) int64 replaced by another State's; fields that do not grow are
        overwritten."""
        layers = []
        for layer, news in zip(self, other):
            pairs = [aligned(name, pair) for name, *pair in zip(layer._fields, layer, news)]
            for tensor, new in pairs:
                tensor[rows] = new.to(tensor.dtype)
            layers.append(layer._make(tensor for tensor, _ in pairs))
        return State(layers)

    def joined(self, *others: "State") -> "State":
        """The State of the sequences of all, its own first."""
        return State(
            layers[0]._make(torch.cat(aligned(name, tensors)) for name, *tensors in zip(layers[0]._fields, *layers))
            for layers in zip(self, *others)
        )


def aligned(name: str, tensors: list[Tensor]) -> list[Tensor]:
    """A field of some states, padded in front to the same number of tokens if it grows; copies then."""
    if name not in GROWING:
        return tensors
    most = max(tensor.shape[1] for tensor in tensors)
    return [F.pad(tensor, (0, 0, most - tensor.shape[1], 0)) for tensor in tensors]


def grows(config: ModelConfig) -> bool:
    """True if a model's State grows with the tokens."""
    return "length" in config.layer_state._fields


def lengths_on_host(cu_seqlens: Tensor) -> list[int]:
    """The lengths of the sequences of a packed row; a GPU whose bounds passed a check is not waited for."""
    return [end - begin for begin, end in pairwise(bounds_on_host(cu_seqlens))]


def extended(before: Any, fields: Mapping[str, Tensor], sizes: list[int]) -> dict[str, list[Tensor]]:
    """The growing fields of each sequence of a packed row: the tokens that a layer's state before it has, if there is
    one, and those of fields (T, …), of `sizes` tokens each."""
    parts = {name: list(new.split(sizes)) for name, new in fields.items()}
    if before is None:
        return parts
    unfilled = [before.past_keys.shape[1] - size for size in before.length.tolist()]
    return {
        name: [torch.cat([past[first:], new]) for past, first, new in zip(getattr(before, name), unfilled, own)]
        for name, own in parts.items()
    }


def grown(before: Any, after: Any, cu_seqlens: Tensor | None) -> Any:
    """The layer's state after a call, made of the state before it and of one with only the call's tokens in its growing
    fields, packed as these are."""
    if not hasattr(after, "length"):
        return after
    fields = {name: getattr(after, name) for name in GROWING}
    if cu_seqlens is not None:
        rows = extended(before, {name: new[0] for name, new in fields.items()}, lengths_on_host(cu_seqlens))
        fields = {name: pad_sequence(row, batch_first=True, padding_side="left") for name, row in rows.items()}
    elif before is not None:
        fields = {name: torch.cat([getattr(before, name), new], 1) for name, new in fields.items()}
    return after._replace(**fields, length=after.length if before is None else before.length + after.length)


def keyed(state: State) -> Iterator[tuple[str, Tensor]]:
    """(key in a file, tensor) of each field of each layer."""
    return ((f"blocks.{i}.{end}", tensor) for i, layer in enumerate(state) for end, tensor in zip(layer.keys(), layer))


def swapped(tensor: Tensor) -> Tensor:
    """Exchange a state's last two axes: a file's for a model's of rows of keys, web-rwkv's for a file's, and back."""
    return tensor.mT


def state_tensors(state: State, rows_are_keys: bool) -> dict[str, Tensor]:
    """A State of one sequence -> {key: float32 tensor} of a saved session."""
    return {key: turned(key, tensor[0], rows_are_keys).float().cpu().contiguous() for key, tensor in keyed(state)}


def turned(key: str, tensor: Tensor, rows_are_keys: bool) -> Tensor:
    """A field of a state with a file's axes for the model's, and back."""
    return swapped(tensor) if rows_are_keys and key.endswith(WKV) else tensor


def state_of(tensors: Mapping[str, Tensor], zeros: State, rows_are_keys: bool, name: str | Path) -> State:
    """State of one sequence from the tensors of a file, which must all have their places and shapes; zeros is the
    model's State before the first token.

    Parts that the file does not hold are zeros. Raises UserError for a file that is neither a session nor holds
    STATE_PARTS of every layer.
    """
    entries = {key: tensor[0] for key, tensor in keyed(zeros)}
    session, parts = not all(map(is_time_state, tensors)), state_parts(tensors) or ("wkv",)
    unexpected = [key for key in tensors if key not in entries]
    missing = [key for key in entries if key not in tensors and (session or belongs(key, parts))]
    if unexpected or missing:
        odd = f"there is no place for its {unexpected[0]}" if unexpected else f"it has no {missing[0]}"
        raise UserError(
            f"{name} is no state of this model of {len(zeros)} layers: {odd}; give a .pth of time states "
            "made for this model, or one that --save_state wrote"
        )
    grow = tuple(f".{name}" for name in GROWING)
    for key, tensor in tensors.items():
        if tensor.shape[key.endswith(grow) :] != entries[key].shape[key.endswith(grow) :]:
            raise UserError(
                f"{name}: {key} has shape {tuple(tensor.shape)}, and this model's is {tuple(entries[key].shape)}; "
                "the state was made for another model"
            )
        if not all_finite(tensor):
            raise UserError(f"{name}: {key} holds NaN or Inf; make the state anew")
    entries |= {key: turned(key, tensor, rows_are_keys).to(entries[key]) for key, tensor in tensors.items()}
    lengths = {tensor.shape[0] for key, tensor in entries.items() if key.endswith(grow)}
    if len(lengths) > 1:
        raise UserError(
            f"{name}: its keys and values are of {sorted(lengths)} tokens, and all of them must be of as many"
        )
    rows, names = iter(entries.values()), zeros[0]._fields[: len(zeros[0].keys())]
    length = {"length": torch.full_like(zeros[0].length, lengths.pop())} if lengths else {}
    return State(layer._replace(**{name: next(rows)[None].contiguous() for name in names}, **length) for layer in zeros)


def split_time_states(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the tensors of a model's parameters, its time states) of a model's {key: tensor}."""
    states = {key: tensor for key, tensor in tensors.items() if is_time_state(key)}
    return {key: tensor for key, tensor in tensors.items() if key not in states}, states


def check_time_states(tensors: Mapping[str, Tensor], name: str | Path) -> None:
    """Raise UserError unless {key: tensor} holds the same STATE_PARTS, in the same shapes, of each layer from 0 on."""
    ends = [end for part in state_parts(tensors) for end in STATE_PARTS[part]]
    layers = [[f"blocks.{i}.{end}" for end in ends] for i in range(-(-len(tensors) // len(ends)))]
    missing = [key for keys in layers for key in keys if key not in tensors]
    if missing:
        raise UserError(
            f"{name} holds {len(tensors)} time states and no {missing[0]}; a state file has one for every layer of the "
            "model, from 0 on: save them all"
        )
    for key, first in (pair for keys in layers for pair in zip(keys, layers[0])):
        shape = tensors[key].shape
        square = len(shape) == 3 and shape[1] == shape[2]
        if shape != tensors[first].shape or not (square if key.endswith(WKV) else len(shape) == 1):
            raise UserError(
                f"{name}: {key} has shape {tuple(shape)}; a time state is (heads, head size, head size), and a shift "
                "(channels,), the same in every layer"
            )
