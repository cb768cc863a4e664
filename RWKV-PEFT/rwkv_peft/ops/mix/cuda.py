"""cuda/mix as Python sees it: built on first use, by nvcc or NVRTC, and launched on torch's stream."""

import ctypes
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ..native.family import DTYPES, CudaFamily
from ..native.kernels import Kernels
from ..native.launch import stream

WARPS = 4  # of a block; cuda/mix/arguments.cuh's WARPS
MOST_SIZE = 128  # channels of a group, which one warp has of a token
MOST_POINTS = 6  # of a lerp
MOST_CHANNELS = 8192  # of a norm of whole tokens
MOST_MIXED = 4096  # of one with token shift
FEW_TOKENS = 8192  # up to which short strips fill a GPU with blocks
LOW_RANKS = (32, 64)  # of a lerp whose product of low rank is inside its kernel, in bfloat16
LOW_POINTS = 5  # that such a lerp has
TILE_TOKENS, LOW_CHANNELS = 64, 32  # of a block's tile there, which in backward shares a token with the next, and step
AFFINE_RANKS, AFFINE_CHANNELS = (16, 32, 64), 64  # of adapters that bend a lerp's points, and of a block's steps
AFFINE_TOKENS = 128  # of a block's tile there in forward
SHARDS = (16, 32, 64, 128)  # channels of one, that what an adapter left is added to, or that a point is summed over
MOST_SUMMED = 3  # points of a norm of whole tokens
SQUARE_RANKS, SQUARE_CHANNELS = (16, 32, 64, 128), 64  # of terms around a squared relu, and of a group's steps


class Layout(NamedTuple):
    """In which order an operation's tensors stand in MixArguments."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()


def _layout(*names: str) -> Layout:
    return Layout(*(tuple(text.split()) for text in names))


_POINTS = range(MOST_POINTS)
_LOW_OUTS, _LOW_GRADS = (" ".join(f"{kind}{i}" for i in range(LOW_POINTS)) for kind in ("out", "grad"))
_OUTS, _GRADS, _BONES, _SHIFTS = (" ".join(f"{kind}{i}" for i in _POINTS) for kind in ("out", "grad", "bone", "gshift"))
_AFFINE = f"x low up stats down {_BONES} {_GRADS} {_SHIFTS}"
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "lerp_forward": _layout("x offsets", _OUTS, "maa"),
        "lerp_backward": _layout(f"x offsets {_GRADS}", "gx goffsets", "maa", " ".join(f"gmaa{i}" for i in _POINTS)),
        "relu_square_forward": _layout("x", "out"),
        "relu_square_backward": _layout("out grad", "gx"),
        "sigmoid_gate_forward": _layout("r v", "out"),
        "sigmoid_gate_backward": _layout("r v grad", "gr gv"),
        "gated_residual_forward": _layout("x r v", "out"),
        "value_residual_forward": _layout("v first low", "out", "v0"),
        "value_residual_backward": _layout("v first low grad more passed", "gv gfirst glow", "v0", "gv0"),
        "sum_parts": _layout("parts", "total"),
        "tanh_forward": _layout("parts", "out"),
        "tanh_backward": _layout("x parts", "gx"),
        "norm_gate_forward": _layout("y g", "out", "weight bias"),
        "norm_gate_backward": _layout("y g grad", "gy gg", "weight bias", "gweight gbias"),
        "delta_keys_forward": _layout("k low", "key a b", "a0 k_k k_a"),
        "delta_keys_backward": _layout("k low gkey ga gb", "gk glow", "a0 k_k k_a", "ga0 gk_k gk_a"),
        "norm_bonus_gate_forward": _layout("y r k v g", "out", "r_k weight bias"),
        "norm_bonus_gate_backward": _layout(
            "y r k v g grad", "gy gr gk gv gg", "r_k weight bias", "gr_k gweight gbias"
        ),
        "bonus_gate_forward": _layout("y v g bonus", "out", "weight bias"),
        "bonus_gate_backward": _layout("y v g grad bonus", "gy gv gg gbonus", "weight bias"),
        "layer_norm_sums": _layout("x grad stats", "", "", "gweight gbias"),
    }
)
_SQUARE = _layout("x squares left up_rows up_columns down_rows down_columns", "y parts")
# Those whose blocks have tiles: a lerp with its product of low rank inside and a squared relu with terms of low rank, a
# kernel a rank, and norms of whole tokens
TILED: Mapping[str, Layout] = MappingProxyType(
    {
        "lerp_low_forward": _layout("x low up stats down", f"{_LOW_OUTS} parts", "maa weight bias"),
        "lerp_low_backward": _layout(
            f"x low up stats down {_LOW_GRADS} decay gdecay {_SHIFTS}", "gx glow", "maa weight bias"
        ),
        "lerp_affine_forward": _layout(_AFFINE, f"{_OUTS} parts shifts", "maa weight bias"),
        "lerp_affine_backward": _layout(_AFFINE, f"{_OUTS} parts", "maa weight bias"),
        "square_forward": _SQUARE,
        "square_backward": _SQUARE,
        "layer_norm_forward": _layout("x", "stats out", "weight bias"),
        "layer_norm_backward": _layout("x grad passed stats", "gx", "weight"),
        "norm_lerp_forward": _layout(
            "x y gate left_x left_y left_gate", f"stats out sum ends {_OUTS} shift0 shift1 shift2", "weight bias maa"
        ),
        "norm_lerp_backward": _layout(
            f"sum grad passed stats gends {_GRADS} grad{MOST_POINTS} y gate left_y left_gate {_SHIFTS}",
            "gx gy ggate gleft_x gleft_y gleft_gate",
            "weight maa",
        ),
    }
)
KERNELS = (
    *(f"mix_{name}_{dtype}" for name in LAYOUTS for dtype in DTYPES.values()),
    *(f"mix_{name}_{rank}" for name in TILED if name.startswith("lerp_low") for rank in LOW_RANKS),
    *(f"mix_{name}_{rank}" for name in TILED if name.startswith("lerp_affine") for rank in AFFINE_RANKS),
    *(f"mix_{name}_{rank}" for name in TILED if name.startswith("square") for rank in SQUARE_RANKS),
    *(f"mix_{name}_{dtype}" for name in TILED if "norm" in name for dtype in DTYPES.values()),
)


_NUMBERS = "channels size strip n low_rank last_point length sequences shard parts summed"


class MixArguments(ctypes.Structure):
    """cuda/mix/arguments.cuh's structure of the same name."""

    _fields_ = [
        ("inputs", ctypes.c_void_p * 23),
        ("outputs", ctypes.c_void_p * 13),
        ("parameters", ctypes.c_void_p * 4),
        ("sums", ctypes.c_void_p * 6),
        *((name, ctypes.c_void_p) for name in ("bounds", "last", "glast")),
        ("tokens", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in _NUMBERS.split()),
        ("eps", ctypes.c_float),
        ("device", ctypes.c_int),
    ]


def call(name: str, like: torch.Tensor, tensors: Mapping[str, torch.Tensor | None], **sizes: Any) -> None:
    """Enqueue the operation `name` on the GPU of `like`; tensors by the names of its Layout, or None, and sizes as
    `launch` or `launch_tiled` takes them."""
    index = like.device.index
    with torch.cuda.device(index):
        enqueue = launch_tiled if name in TILED else launch
        enqueue(FAMILY.kernels(index), stream(like), name, like, tensors, **sizes)


def launch(
    built: Kernels,
    on: int | None,
    name: str,
    like: torch.Tensor,
    tensors: Mapping[str, torch.Tensor | None],
    tokens: int = 0,
    channels: int = 0,
    heads: int = 0,
    size: int = MOST_SIZE,
    count: int = 0,
    **others: Any,
) -> None:
    """`call` with given kernels, on a given stream. tokens of `channels`, or of `heads` of `size` channels; `count` of
    elements that are all alike lie as rows of `like`. others: further fields of MixArguments; tensors become addresses.
    """
    layout = LAYOUTS[name]
    if count:
        channels = like.shape[-1]
        tokens = count // channels
    channels = heads * size if heads else channels
    strip = 8 * WARPS if tokens <= FEW_TOKENS else 32 * WARPS
    strips, groups = -(-tokens // strip), -(-channels // size)
    wanted = [tensors.get(sum_) for sum_ in layout.sums]
    partial = [None if x is None else like.new_empty(strips, channels, dtype=torch.float32) for x in wanted]
    arguments = _arguments(layout, like, tensors, partial, **others)
    arguments.tokens, arguments.channels, arguments.size, arguments.strip = tokens, channels, size, strip
    FAMILY.run(built, f"mix_{name}_{DTYPES[like.dtype]}", arguments, strips * groups, on)
    for target, part in zip(wanted, partial):
        if target is not None and part is not None:
            torch.sum(part, 0, out=target.view(-1))


def launch_tiled(
    built: Kernels,
    on: int | None,
    name: str,
    like: torch.Tensor,
    tensors: Mapping[str, torch.Tensor | None],
    tokens: int,
    channels: int,
    rank: int = 0,
    size: int = 0,
    strip: int = 1,
    slots: int = 1,
    **others: Any,
) -> None:
    """The same for an operation of TILED. rank: of its products, where blocks have `size` channels, and a tile of them
    `slots` blocks; strip: tokens of another's block."""
    arguments = _arguments(TILED[name], like, tensors, [], strip=strip, **others)
    arguments.tokens, arguments.channels, arguments.size = tokens, channels, size
    if rank:
        tiles = {"lerp_low_backward": TILE_TOKENS - 1, "lerp_affine_forward": AFFINE_TOKENS}
        tile = strip if name == "lerp_affine_backward" else tiles.get(name, TILE_TOKENS)
        blocks = slots * -(-tokens // tile) * -(-channels // size)
        return FAMILY.run(built, f"mix_{name}_{rank}", arguments, blocks, on)
    widest = 16 // like.element_size()  # elements that a thread reads at once, where they lie so
    addresses = [x.data_ptr() for x in (*tensors.values(), *others.values()) if isinstance(x, torch.Tensor)]
    arguments.size = 2 if channels % widest or any([address % 16 for address in addresses]) else widest
    FAMILY.run(built, f"mix_{name}_{DTYPES[like.dtype]}", arguments, -(-tokens // strip), on)


def _arguments(
    layout: Layout,
    like: torch.Tensor,
    tensors: Mapping[str, torch.Tensor | None],
    sums: list[torch.Tensor | None],
    **others: Any,
) -> MixArguments:
    plain = {key: x.data_ptr() if isinstance(x, torch.Tensor) else x for key, x in others.items()}
    arguments = MixArguments(device=like.device.index or 0, **plain)
    rooms = arguments.inputs, arguments.outputs, arguments.parameters, arguments.sums
    named = ([tensors.get(name) for name in names] for names in layout[:3])
    for room, given in zip(rooms, (*named, sums)):
        for i, x in enumerate(given):
            if x is not None:
                room[i] = x.data_ptr()
    return arguments


def takes(first: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether tensors, or None, are what the kernels take: CudaFamily.takes' with an even number of channels."""
    return first.shape[-1] % 2 == 0 and FAMILY.takes(first, *others)


def _trial(built: Kernels, device: int) -> None:
    x = torch.zeros(1, 2, device=device)
    launch(built, stream(x), "relu_square_forward", x, dict(x=x, out=torch.empty_like(x)), count=2)


FAMILY = CudaFamily("mix", "mix/mix.cu", KERNELS, MixArguments, _trial)
