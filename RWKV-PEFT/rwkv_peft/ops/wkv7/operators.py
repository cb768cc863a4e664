"""The backends with a backward of their own as torch.library operators, with fake kernels and an autograd formula.

rwkv_peft::wkv7_forward and rwkv_peft::wkv7_backward take contiguous, checked tensors: r w k v a b and their gradients
of one dtype, the states float32, cu_seqlens int64. torch.compile and FakeTensor memory planning see them as single
operations. `backend` names a module here and, after a colon, an instruction set; a module has

    unavailable(level) -> None, or why it cannot be used and what would help
    checkpoint_count(r, sequences) -> how many states (H, N, N) its forward keeps for its backward
    forward(r, w, k, v, a, b, state, cu_seqlens, save, level) -> y, final state, checkpoints
    backward(r, w, k, v, a, b, state, cu_seqlens, checkpoints, gy, gfinal, level) -> gr, gw, gk, gv, ga, gb, gstate
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..eager import second_derivative
from ..recurrence import check_bounds

_library = torch.library.Library("rwkv_peft", "FRAGMENT")
_INPUTS = "Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? state, Tensor? cu_seqlens"
_library.define(f"wkv7_forward({_INPUTS}, bool save, str backend) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"wkv7_backward({_INPUTS}, Tensor checkpoints, Tensor? gy, Tensor? gfinal, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def backend_module(name: str) -> ModuleType:
    """The backend "chunked", "cpu" or "cuda"; loaded on first use."""
    return importlib.import_module(f".{name}", __package__)


def call_forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """A backend's forward, past torch's operators."""
    if cu_seqlens is not None:  # a compiled graph comes here with values that nobody has seen yet
        check_bounds("wkv7", cu_seqlens, r.shape[1])
    name, _, level = backend.partition(":")
    return backend_module(name).forward(r, w, k, v, a, b, state, cu_seqlens, save=save, level=level)


def call_backward(*tensors: Tensor | None, backend: str) -> tuple[Tensor, ...]:
    """A backend's backward, past torch's operators."""
    name, _, level = backend.partition(":")
    return backend_module(name).backward(*tensors, level=level)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    return call_backward(*arguments[:-1], backend=arguments[-1])


_library.impl("wkv7_forward", call_forward, "CompositeExplicitAutograd")
_library.impl("wkv7_backward", _backward, "CompositeExplicitAutograd")


def _states_like(r: Tensor, count: int) -> Tensor:
    _, _, H, N = r.shape
    return r.new_empty(count, H, N, N, dtype=torch.float32)


def _sequences(r: Tensor, cu_seqlens: Tensor | None) -> int:
    return r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@torch.library.register_fake("rwkv_peft::wkv7_forward", lib=_library)
def _forward_fake(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    sequences = _sequences(r, cu_seqlens)
    module = backend_module(backend.partition(":")[0])
    count = module.checkpoint_count(r, sequences) if save else 0
    return torch.empty_like(r), _states_like(r, sequences), _states_like(r, count)


@torch.library.register_fake("rwkv_peft::wkv7_backward", lib=_library)
def _backward_fake(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    gy: Tensor | None,
    gfinal: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    return (*(torch.empty_like(x) for x in (r, w, k, v, a, b)), _states_like(r, _sequences(r, cu_seqlens)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[2])
    ctx.backend = backend


def _differentiate(ctx: Any, gy: Tensor | None, gfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *tensors, checkpoints = ctx.saved_tensors
    if gy is None and gfinal is None:
        return (None,) * 10
    gy, gfinal = (None if x is None else x.contiguous() for x in (gy, gfinal))
    *gradients, gstate = torch.ops.rwkv_peft.wkv7_backward(*tensors, checkpoints, gy, gfinal, ctx.backend)
    return *gradients, None if tensors[6] is None else gstate, None, None, None


def _refuse(ctx: Any, *_: Tensor | None) -> None:
    raise second_derivative("wkv7")


torch.library.register_autograd("rwkv_peft::wkv7_forward", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("rwkv_peft::wkv7_backward", _refuse, lib=_library)
