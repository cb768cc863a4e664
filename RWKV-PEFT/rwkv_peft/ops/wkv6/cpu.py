"""The CPU kernel as a wkv6 backend: builds cpu/wkv6 on first use and calls it through its C interface."""

import ctypes
import functools

import torch
from torch import Tensor

from ..native import levels
from ..native.arguments import fields, fill
from ..native.cpu import cpu_library
from ..native.errors import BuildError

TILE = 64  # steps between two saved states; cpu/wkv6/rows.h's kTile


class Arguments(ctypes.Structure):
    """cpu/wkv6/arguments.h's structure of the same name."""

    _fields_ = fields(
        "r k v w u state checkpoints y final_state gy gfinal gr gk gv gw gu gstate cu_seqlens",
        "sequences tokens heads head_size",
    )


FUNCTIONS = tuple((name, ctypes.c_int, Arguments) for name in ("wkv6_cpu_forward", "wkv6_cpu_backward"))


def unavailable(level: str = "") -> str | None:
    """None where the kernel works here (at `level`, or at any), else why it does not and what would help."""
    return _unavailable(level)


@functools.cache
def _unavailable(level: str) -> str | None:
    if level and not levels.is_here(level):
        return f"this processor has no {level}; its best is cpu:{levels.best_level()}"
    try:
        _library(level or levels.best_level())
    except BuildError as error:
        return str(error)
    return None


def checkpoint_count(r: Tensor, sequences: int) -> int:
    """States kept for backward: one at each 64th step of a sequence, except its first (that one is the input)."""
    return r.shape[0] * r.shape[1] // TILE


def forward(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    level: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous r k v w (B, T, H, N), float32 or bfloat16; u (H, N), state (n, H, N, N) or None, float32;
    cu_seqlens (n + 1,) int64 or None -> y, final state, checkpoints (float32, empty unless `save`)."""
    B, T, H, N = r.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty_like(r)
    final_state = u.new_empty(sequences, H, N, N)
    checkpoints = u.new_empty(checkpoint_count(r, sequences) if save else 0, H, N, N)
    tensors = dict(r=r, k=k, v=v, w=w, u=u, state=state, cu_seqlens=cu_seqlens, y=y, final_state=final_state)
    arguments = _arguments(r, sequences, tensors | dict(checkpoints=checkpoints if save else None))
    _check(_library(level or levels.best_level()).wkv6_cpu_forward(arguments))
    return y, final_state, checkpoints


def backward(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    gy: Tensor | None,
    gfinal: Tensor | None,
    level: str,
) -> tuple[Tensor, ...]:
    """The gradients of r k v w u and state, given those of y and of the final state (None for zeros)."""
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    H, N = u.shape
    gr, gk, gv, gw = (torch.empty_like(x) for x in (r, k, v, w))
    gu = torch.empty_like(u)
    gstate = u.new_empty(sequences, H, N, N)
    tensors = dict(r=r, k=k, v=v, w=w, u=u, state=state, cu_seqlens=cu_seqlens, checkpoints=checkpoints)
    gradients = dict(gy=gy, gfinal=gfinal, gr=gr, gk=gk, gv=gv, gw=gw, gu=gu, gstate=gstate)
    _check(_library(level or levels.best_level()).wkv6_cpu_backward(_arguments(r, sequences, tensors | gradients)))
    return gr, gk, gv, gw, gu, gstate


def _arguments(r: Tensor, sequences: int, tensors: dict[str, Tensor | None]) -> Arguments:
    B, T, H, N = r.shape
    return fill(Arguments, r, tensors, sequences=sequences, tokens=B * T, heads=H, head_size=N)


def _check(status: int) -> None:
    if status != 0:
        raise MemoryError("wkv6: the CPU kernel found no memory for its work buffers; lower the batch or the threads")


@functools.cache
def _library(level: str) -> ctypes.CDLL:
    """A level's loaded library; BuildError where it cannot be built or loaded (not cached, so that a mended setup
    works)."""
    return cpu_library(f"wkv6_cpu_{level}", "wkv6/wkv6.cpp", levels.level_flags()[level], FUNCTIONS)
