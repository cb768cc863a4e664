"""The kernels as torch.library operators, with fake kernels and an autograd formula.

rwkv_peft::wkv6_forward and rwkv_peft::wkv6_backward take contiguous, checked tensors: r k v w and their gradients of
one kernel dtype, u and the states float32, cu_seqlens int64. torch.compile and FakeTensor memory planning see them as
single operations. Each device's kernel is a backend module (cpu.py, cuda.py) with

    unavailable() -> None, or why it cannot be used and what would help
    checkpoint_count(r, sequences) -> how many states (H, N, N) its forward keeps for its backward
    forward(r, k, v, w, u, state, cu_seqlens, save, level) -> y, final state, checkpoints
    backward(r, k, v, w, u, state, cu_seqlens, checkpoints, gy, gfinal, level) -> gr, gk, gv, gw, gu, gstate
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..eager import second_derivative
from .checks import check_bounds

_library = torch.library.Library("rwkv_peft", "DEF")
_library.define(
    "wkv6_forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? state, Tensor? cu_seqlens, "
    "bool save, str level) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "wkv6_backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? state, Tensor? cu_seqlens, "
    "Tensor checkpoints, Tensor? gy, Tensor? gfinal, str level) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def backend_module(device_type: str) -> ModuleType:
    """The backend of a device type, "cpu" or "cuda"; loaded on first use."""
    return importlib.import_module(f".{device_type}", __package__)


def _forward(
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
    if cu_seqlens is not None:  # a compiled graph comes here with values that nobody has seen yet
        check_bounds(cu_seqlens, r.shape[1])
    return backend_module(r.device.type).forward(r, k, v, w, u, state, cu_seqlens, save=save, level=level)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, level = arguments
    return backend_module(tensors[0].device.type).backward(*tensors, level=level)


for _key in ("CPU", "CUDA"):
    _library.impl("wkv6_forward", _forward, _key)
    _library.impl("wkv6_backward", _backward, _key)


def _states_like(u: Tensor, count: int) -> Tensor:
    H, N = u.shape
    return u.new_empty(count, H, N, N)


@torch.library.register_fake("rwkv_peft::wkv6_forward", lib=_library)
def _forward_fake(
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
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    device = "cuda" if r.device.type == "cuda" else "cpu"
    count = backend_module(device).checkpoint_count(r, sequences) if save else 0
    return torch.empty_like(r), _states_like(u, sequences), _states_like(u, count)


@torch.library.register_fake("rwkv_peft::wkv6_backward", lib=_library)
def _backward_fake(
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
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (*(torch.empty_like(x) for x in (r, k, v, w, u)), _states_like(u, sequences))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    r, k, v, w, u, state, cu_seqlens, _, level = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(r, k, v, w, u, state, cu_seqlens, output[2])
    ctx.level = level


def _differentiate(ctx: Any, gy: Tensor | None, gfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    r, k, v, w, u, state, cu_seqlens, checkpoints = ctx.saved_tensors
    if gy is None and gfinal is None:
        return (None,) * 9
    if gy is not None:
        gy = gy.contiguous()
    if gfinal is not None:
        gfinal = gfinal.contiguous()
    gr, gk, gv, gw, gu, gstate = torch.ops.rwkv_peft.wkv6_backward(
        r, k, v, w, u, state, cu_seqlens, checkpoints, gy, gfinal, ctx.level
    )
    return gr, gk, gv, gw, gu, None if state is None else gstate, None, None, None


def _refuse(ctx: Any, *_: Tensor | None) -> None:
    raise second_derivative("wkv6")


torch.library.register_autograd("rwkv_peft::wkv6_forward", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("rwkv_peft::wkv6_backward", _refuse, lib=_library)
