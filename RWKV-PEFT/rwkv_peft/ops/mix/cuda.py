"""Calls cuda/mix, which NVRTC builds on first use, on torch's stream."""

import ctypes
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..native.calls import aligned
from ..native.cuda import CudaFamily
from .operations import OPERATIONS, Operation

WARPS = 4  # warps of a block: WARPS of cuda/mix/arguments.cuh
MOST_SIZE = 128  # the most channels of a token that one warp takes (a group)
MOST_POINTS = 6  # the most points of a lerp
FEW_TOKENS = 8192  # up to here strips are short, so that there are blocks enough to fill a GPU
LOW_RANKS = (32, 64)  # ranks of a lerp whose kernel includes the low-rank product
LOW_POINTS = 5  # the number of points of such a lerp
TILE_TOKENS, LOW_CHANNELS = 64, 32  # tokens of its tiles (in backward one is the next tile's, too), channels of a step


class Layout(NamedTuple):
    """The order of an operation's tensors in MixArguments."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()


def _layout(*names: str) -> Layout:
    return Layout(*(tuple(text.split()) for text in names))


def _layouts(op: Operation) -> Iterator[tuple[str, Layout]]:
    """(the direction, its Layout) of an operation's both."""
    of_outputs, of_inputs, of_parameters = op.gradients
    yield "forward", Layout(op.inputs, op.outputs, op.parameters)
    read = op.outputs if op.from_result else op.inputs
    yield "backward", Layout(read + of_outputs, of_inputs, op.parameters, of_parameters)


_POINTS = range(MOST_POINTS)
_LOW_OUTS, _LOW_GRADS = (" ".join(f"{kind}{i}" for i in range(LOW_POINTS)) for kind in ("out", "grad"))
_OUTS, _GRADS = (" ".join(f"{kind}{i}" for i in _POINTS) for kind in ("out", "grad"))
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "lerp_forward": _layout("x offsets", _OUTS, "maa"),
        "lerp_backward": _layout(f"x offsets {_GRADS}", "gx goffsets", "maa", " ".join(f"gmaa{i}" for i in _POINTS)),
        **{f"{name}_{way}": layout for name, op in OPERATIONS.items() for way, layout in _layouts(op)},
    }
)
# Lerps with their low-rank product, whose blocks take tiles (a kernel a rank)
TILED: Mapping[str, Layout] = MappingProxyType(
    {
        "lerp_low_forward": _layout("x low up", _LOW_OUTS, "maa"),
        "lerp_low_backward": _layout(f"x low up {_LOW_GRADS}", "gx glow", "maa"),
    }
)


KERNELS = (*(f"mix_{name}" for name in LAYOUTS), *(f"mix_{name}_{rank}" for name in TILED for rank in LOW_RANKS))
_NUMBERS = "channels size strip n length sequences"


class MixArguments(ctypes.Structure):
    """The structure of the same name in cuda/mix/arguments.cuh."""

    _fields_ = [
        ("inputs", ctypes.c_void_p * 8),
        ("outputs", ctypes.c_void_p * 6),
        ("parameters", ctypes.c_void_p * 4),
        ("sums", ctypes.c_void_p * 6),
        *((name, ctypes.c_void_p) for name in ("bounds", "last", "glast")),
        ("tokens", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in _NUMBERS.split()),
        ("eps", ctypes.c_float),
    ]


def call(name: str, like: Tensor, tensors: Mapping[str, Tensor | None], size: int = 0, **others: Any) -> None:
    """Enqueue the operation `name` on the GPU of `like`; tensors by the names of its Layout and of MixArguments (None:
    not given). An operation of LAYOUTS works on groups of `size` channels, such as a head's (0: as many as a warp
    takes); blocks of TILED take `size` channels. others: tokens, channels and further fields of MixArguments."""
    tokens, channels, kernel = others["tokens"], others["channels"], f"mix_{name}"
    layout, strip = {**LAYOUTS, **TILED}[name], 1
    if name in LAYOUTS:
        size, strip = size or MOST_SIZE, 8 * WARPS if tokens <= FEW_TOKENS else 32 * WARPS
        blocks = -(-tokens // strip) * -(-channels // size)
    else:
        tile = TILE_TOKENS - 1 if name == "lerp_low_backward" else TILE_TOKENS
        up = cast(Tensor, tensors["up"])
        tensors = {**tensors, **{x: aligned(tensors.get(x)) for x in layout.inputs + layout.parameters}}
        kernel, blocks = f"mix_{name}_{up.shape[1]}", -(-tokens // tile) * -(-channels // size)
    wanted = [tensors.get(sum_) for sum_ in layout.sums]
    sums = [None if x is None else like.new_empty(-(-tokens // strip), channels, dtype=torch.float32) for x in wanted]
    named = ([tensors.get(name) for name in names] for names in layout[:3])
    tables = zip(("inputs", "outputs", "parameters", "sums"), (*named, sums))
    given: dict[str, Any] = {name: tensors.get(name) for name in ("bounds", "last", "glast")}
    given |= {table: tuple(None if x is None else x.data_ptr() for x in of) for table, of in tables}
    FAMILY.run(kernel, like, {**given, **others, "size": size, "strip": strip}, blocks)
    for target, part in zip(wanted, sums):
        if target is not None and part is not None:
            torch.sum(part, 0, out=target.view(-1))


def takes(first: Tensor, *others: Tensor | None) -> bool:
    """True if the kernels take these tensors (None: not given): as CudaFamily.takes, an even number of channels."""
    return first.shape[-1] % 2 == 0 and FAMILY.takes(first, *others)


FAMILY = CudaFamily("mix", KERNELS, MixArguments, in_graphs=True)
