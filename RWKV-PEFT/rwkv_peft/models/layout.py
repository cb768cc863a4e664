"""The layout of a model's tensors and states, by names and shapes alone: files of keys read it without torch."""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..cli.errors import UserError
from ..cli.names import STATE_PARTS
from ..config import ModelConfig

if TYPE_CHECKING:
    from torch import Size, Tensor

TIME_STATE, SHIFT = "time_state", "shift"
WKV = f"att.{TIME_STATE}"  # the end of the wkv state's key in a file, of every generation
LARGEST_HEAD = 128


class LayerState(NamedTuple):
    """The state of one layer of RWKV-6 or RWKV-7 between two calls.

    att_shift, ffn_shift (B, C): the last normalized input of each mix; wkv (B, H, N, N) float32, its rows keys or
    values, by generation (Family.rows_are_keys).
    """

    att_shift: "Tensor"
    wkv: "Tensor"
    ffn_shift: "Tensor"

    @staticmethod
    def keys() -> tuple[str, ...]:
        """The ends of the fields' keys in a file."""
        return "att.shift", WKV, "ffn.shift"

    @staticmethod
    def shapes(config: ModelConfig) -> tuple[tuple[int, ...], ...]:
        """The fields' shapes for one sequence."""
        return (config.n_embd,), wkv_shape(config), (config.n_embd,)


def is_time_state(key: str) -> bool:
    """True if a key names a field of a layer's state that may be tuned, and that a model's own file may hold."""
    return belongs(key, STATE_PARTS)


def belongs(key: str, parts: Iterable[str]) -> bool:
    """True if a key names a field of a layer's state in one of the STATE_PARTS."""
    return key.endswith(tuple(f".{end}" for part in parts for end in STATE_PARTS[part]))


def state_parts(keys: Iterable[str]) -> tuple[str, ...]:
    """The STATE_PARTS that some keys belong to."""
    names = list(keys)
    return tuple(part for part in STATE_PARTS if any(belongs(key, (part,)) for key in names))


def state_parts_flag(keys: Iterable[str]) -> str:
    """The --state_parts under which states with some keys train, as " --state_parts wkv shift"; "" for the default."""
    parts = state_parts(keys)
    return "" if parts in ((), ("wkv",)) else f" --state_parts {' '.join(parts)}"


def time_state_shapes(config: ModelConfig, parts: Iterable[str] = ("wkv",)) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of some STATE_PARTS, which a file has for every layer or for none."""
    fields = [*zip(config.layer_state.keys(), config.layer_state.shapes(config))]
    shapes = {f"blocks.{i}.{end}": shape for i in range(config.n_layer) for end, shape in fields}
    return {key: shape for key, shape in shapes.items() if belongs(key, parts)}


def wkv_shape(config: ModelConfig) -> tuple[int, int, int]:
    """The shape (H, N, N) of a layer's wkv state of one sequence."""
    return config.n_head, config.head_size, config.head_size


def two_axes(tensors: "Mapping[str, Tensor]", heads: str) -> "tuple[Size, Size]":
    """The shapes of the embedding and of a tensor (heads, head size). Raises ValueError if they have no two axes."""
    embedding, found = tensors["emb.weight"].shape, tensors[heads].shape
    if len(embedding) != 2 or len(found) != 2 or 0 in found or 0 in embedding:
        raise ValueError(
            f"emb.weight must be (vocabulary, channels) and {heads.rpartition('.')[2]} (heads, head size), and they "
            f"are {tuple(embedding)} and {tuple(found)}"
        )
    return embedding, found


def check_head_size(size: int, channels: int, what: str = "channels") -> None:
    """Raise UserError for a --head_size that the kernels do not take, or that does not divide the channels."""
    if channels % size or size % 4 or size > LARGEST_HEAD:
        raise UserError(
            f"--head_size {size} must divide the {what} ({channels}), be a multiple of 4 and at most {LARGEST_HEAD}"
        )


def count_layers(keys: Iterable[str]) -> int:
    """The number of layers that keys such as blocks.N.… name; 0 if none does. Raises ValueError if there are fewer keys
    than layers: otherwise one name with a large number would make its reader allocate without limit."""
    names = list(keys)
    numbers = [int(match[1]) for match in map(re.compile(r"blocks\.([0-9]+)\.").match, names) if match]
    layers = 1 + max(numbers, default=-1)
    if layers > len(names):
        raise ValueError(f"a name has layer {layers - 1}, and there are {len(names)} tensors in all")
    return layers
