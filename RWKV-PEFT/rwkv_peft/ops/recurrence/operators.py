"""A recurrence's backends as torch.library operators, with fake kernels and an autograd formula, so that torch.compile
and FakeTensor memory planning see single operations."""

from typing import Any

import torch
from torch import Tensor

from .backends import Backends
from .checks import check_bounds
from .eager import second_derivative
from .signature import Signature, sequences_of

NAMESPACE = "rwkv_peft"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


class Operators:
    """rwkv_peft::OP_forward(*inputs, state, cu_seqlens, save, backend) -> y, final state, checkpoints and
    rwkv_peft::OP_backward(*inputs, state, cu_seqlens, checkpoints, gy, gfinal, backend) -> the gradients of the inputs
    and the state. `backend` is one that Backends has chosen, but not "reference"."""

    def __init__(self, signature: Signature, backends: Backends) -> None:
        self._op, self._backends, self._count = signature.op, backends, len(signature.inputs)
        tensors = ", ".join((*(f"Tensor {name}" for name in signature.inputs), "Tensor? state", "Tensor? cu_seqlens"))
        gradients = ", ".join(["Tensor"] * (self._count + 1))
        saved = "Tensor checkpoints, Tensor? gy, Tensor? gfinal"
        forward, backward = f"{self._op}_forward", f"{self._op}_backward"
        _LIBRARY.define(f"{forward}({tensors}, bool save, str backend) -> (Tensor, Tensor, Tensor)")
        _LIBRARY.define(f"{backward}({tensors}, {saved}, str backend) -> ({gradients})")
        _LIBRARY.impl(forward, self._forward, "CompositeExplicitAutograd")
        _LIBRARY.impl(backward, self._backward, "CompositeExplicitAutograd")
        forward, backward = f"{NAMESPACE}::{forward}", f"{NAMESPACE}::{backward}"
        torch.library.register_fake(forward, self._forward_fake, lib=_LIBRARY)
        torch.library.register_fake(backward, self._backward_fake, lib=_LIBRARY)
        torch.library.register_autograd(forward, self._differentiate, setup_context=self._save, lib=_LIBRARY)
        torch.library.register_autograd(backward, self._refuse, lib=_LIBRARY)
        self.forward = getattr(torch.ops.rwkv_peft, f"{self._op}_forward")
        self.backward = getattr(torch.ops.rwkv_peft, f"{self._op}_backward")

    def _forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, save, chosen = arguments
        r, cu_seqlens = tensors[0], tensors[-1]
        if cu_seqlens is not None:  # in a compiled graph, nobody has checked the values yet
            check_bounds(self._op, cu_seqlens, r.shape[1])
        backend, level = self._backends[chosen]
        return backend.forward(*tensors, save=save, level=level)

    def _backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, chosen = arguments
        backend, level = self._backends[chosen]
        return backend.backward(*tensors, level=level)

    def _forward_fake(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, save, chosen = arguments
        r, sequences = tensors[0], sequences_of(tensors[0], tensors[-1])
        count = self._backends[chosen][0].checkpoint_count(r, sequences) if save else 0
        return torch.empty_like(r), _states_like(r, sequences), _states_like(r, count)

    def _backward_fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        inputs, cu_seqlens = arguments[: self._count], arguments[self._count + 1]
        states = _states_like(inputs[0], sequences_of(inputs[0], cu_seqlens))
        return *(torch.empty_like(x) for x in inputs), states

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _, chosen = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, output[2])
        ctx.chosen = chosen

    def _differentiate(self, ctx: Any, gy: Tensor | None, gfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *tensors, checkpoints = ctx.saved_tensors
        if gy is None and gfinal is None:
            return (None,) * (len(tensors) + 2)
        gy, gfinal = (None if x is None else x.contiguous() for x in (gy, gfinal))
        *gradients, gstate = self.backward(*tensors, checkpoints, gy, gfinal, ctx.chosen)
        state = tensors[self._count]
        return *gradients, None if state is None else gstate, None, None, None

    def _refuse(self, ctx: Any, *_: Tensor | None) -> None:
        raise second_derivative(self._op)


def _states_like(r: Tensor, count: int) -> Tensor:
    _, _, H, N = r.shape
    return r.new_empty(count, H, N, N, dtype=torch.float32)
