"""A recurrence as an operation: the choice of a backend, an autograd Function, torch.library operators, and the call,
which checks the arguments and converts them for the kernels. A generation's folder (wkv6/, wkv7/) has the rest: its
signature, formula and reference, its chunked form, and what its kernels are.

A backend takes contiguous, checked tensors in the order of the signature: those (B, T, H, N) of one dtype, the others
and the states float32, cu_seqlens int64. Operations are differentiable once, in all inputs and the state.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..native.calls import constant_when_compiled, differentiable_once
from ..native.cpu import LEVELS
from .chunked import Chunked
from .kernels import CpuRecurrence, CudaRecurrence
from .signature import Signature, as_int64, check, check_bounds, sequences_of

KERNELS = ("cpu", "cuda")  # backends for the type of device that they are named after; others are for any device
FALLBACK = "chunked"  # the backend that "auto" takes if there is no kernel


# One way to compute a recurrence, with its own backward. unavailable(level) -> None if it can be used, else the reason
# and the remedy; checkpoint_count(a tensor (B, T, H, N), sequences) -> the number of states that forward saves.
Backend = Chunked | CpuRecurrence | CudaRecurrence


class Recurrence:
    """The operation of a signature."""

    def __init__(
        self,
        signature: Signature,
        reference: Callable[..., tuple[Tensor, Tensor]],
        chunked: Chunked,
        cpu: CpuRecurrence,
        cuda: CudaRecurrence,
    ) -> None:
        """reference: the operation in plain torch, which autograd differentiates; the others: its backends."""
        self.signature, self.reference, self.row_count = signature, reference, len(signature.rows)
        self.chunked, self.cpu, self.cuda = chunked, cpu, cuda
        self.table = MappingProxyType[str, Backend]({"chunked": chunked, "cpu": cpu, "cuda": cuda})
        self.operators = Operators(signature, self.backend)

        @constant_when_compiled  # does not work on methods
        def choose(backend: str, device_type: str, index: int | None, dtype: torch.dtype, head_size: int) -> str:
            return self._resolve(backend, device_type, index, dtype, head_size)

        self.choose = choose

    def backends(self, *names: str) -> dict[str, str | None]:
        """Each of some names, of all by default -> None if it can be used here, else the reason and the remedy. May
        compile these, which takes a GPU's kernels a minute."""
        reasons = {name: self.table[name].unavailable("") for name in names or self.table if name in self.table}
        return {"reference": None, **reasons}

    def backend(self, chosen: str) -> tuple[Backend, str]:
        """The Backend that `choose` has chosen, and its level."""
        name, _, level = chosen.partition(":")
        return self.table[name], level

    @functools.cache  # noqa: B019 - a Recurrence lives as long as its module
    def _resolve(self, backend: str, device_type: str, index: int | None, dtype: torch.dtype, head_size: int) -> str:
        """The backend to call: `backend` itself, or the meaning of "auto" for this device (GPUs differ), dtype and head
        size."""
        is_gpu = device_type == "cuda" and index is not None
        with torch.cuda.device(index) if is_gpu else nullcontext():  # which backends are asked about
            return (
                self._resolve_auto(device_type, dtype, head_size)
                if backend == "auto"
                else self._checked(backend, device_type, dtype, head_size)
            )

    def _checked(self, backend: str, device_type: str, dtype: torch.dtype, head_size: int) -> str:
        """A named backend, if it is known and takes these tensors."""
        if backend == "reference":
            return backend
        op, (name, _, level) = self.signature.op, str(backend).partition(":")
        if name not in self.table or (level and (name != "cpu" or level not in LEVELS)):
            known = ", ".join(("auto", "reference", *self.table, *(f"cpu:{level}" for level in LEVELS)))
            raise ValueError(f"{op}: backend {backend!r} is unknown; take one of {known}")
        reason = self.table[name].unavailable(level)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {backend!r} cannot be used: {reason}")
        if name in KERNELS and device_type not in (name, "meta"):
            raise ValueError(
                f"{op}: backend {name!r} with tensors on {device_type}; move them to {name}, or take 'auto'"
            )
        if dtype == torch.float64:
            raise ValueError(
                f"{op}: backend {backend!r} computes in float32, not {dtype}; convert, or take 'reference'"
            )
        if name == "cuda" and (reason := self.cuda.refusal(dtype, head_size)):
            raise ValueError(f"{op}: backend {backend!r} cannot be used: {reason}, or take 'auto'")
        return backend

    def _resolve_auto(self, device_type: str, dtype: torch.dtype, head_size: int) -> str:
        if dtype == torch.float64:
            return "reference"
        if device_type == "meta":  # tensors without data stand for a GPU's
            return FALLBACK if self.cuda.refusal(dtype, head_size) else "cuda"
        reason: str | None = f"there is no kernel for {device_type}"
        if device_type in KERNELS:
            reason = self.table[device_type].unavailable("")
        if device_type == "cuda":
            reason = reason or self.cuda.refusal(dtype, head_size)
        op = self.signature.op
        if reason is not None:
            warnings.warn(
                f"{op} takes backend {FALLBACK!r}, which is slow, for tensors on {device_type}: {reason}",
                RuntimeWarning,
                stacklevel=5,
            )
        chosen = device_type if reason is None else FALLBACK
        logging.getLogger(__name__).info("%s takes backend %r on %s", op, chosen, device_type)
        return chosen

    def compute(
        self, inputs: Sequence[Tensor], state: Tensor | None, cu_seqlens: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        """y in v's dtype, and the final state. Raises ValueError if arguments do not fit, RuntimeError if a named
        backend is unusable."""
        v = check(self.signature, inputs, state, cu_seqlens)
        rows, shared = inputs[: self.row_count], inputs[self.row_count :]
        dtype, device = _common_dtype(rows), v.device
        chosen = self.choose(backend, device.type, device.index, dtype, v.shape[3])
        if chosen == "reference":
            return self.reference(*inputs, state, cu_seqlens)

        kernel_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        tensors = [x.to(kernel_dtype).contiguous() for x in rows] + [x.float().contiguous() for x in shared]
        state = None if state is None else state.float().contiguous()
        cu_seqlens = None if cu_seqlens is None else as_int64(cu_seqlens, v.shape[1])
        leaves = tensors if state is None else [*tensors, state]
        save = torch.is_grad_enabled() and any([x.requires_grad for x in leaves])
        # Under torch.compile, FakeTensor or the meta device the operator must be seen. Other calls go straight to the
        # kernel, because on a single step of generation the operator costs as much again.
        if torch.compiler.is_compiling() or type(v) is not Tensor or v.device.type == "meta":
            y, final_state, _ = self.operators.forward(*tensors, state, cu_seqlens, save, chosen)
            return y.to(v.dtype), final_state
        kernels, level = self.backend(chosen)
        if save:
            y, final_state = Differentiable.apply(kernels, level, *tensors, state, cu_seqlens)
        else:
            y, final_state, _ = kernels.forward(*tensors, state, cu_seqlens, save=False, level=level)
        return y.to(v.dtype), final_state


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that all tensors are converted to: under autocast the decay is float32, the projections bfloat16."""
    dtype = tensors[0].dtype
    for x in tensors:
        if x.dtype != dtype:
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype


class Differentiable(Function):
    """(backend, its level, *inputs, state, cu_seqlens) -> y, final state."""

    @staticmethod
    def forward(ctx: Any, backend: Backend, level: str, *tensors: Tensor | None) -> Any:
        y, final_state, checkpoints = backend.forward(*tensors, save=True, level=level)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, checkpoints)
        ctx.backend, ctx.level = backend, level
        return y, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gy: Tensor | None, gfinal: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # read once: a second reading is an error if blocks are recomputed
        if gy is None and gfinal is None:
            return (None,) * (1 + len(saved))
        *gradients, gstate = ctx.backend.backward(*saved, gy, gfinal, level=ctx.level)
        state = saved[-3]
        return None, None, *gradients, None if state is None else gstate, None


NAMESPACE = "rwkv_peft"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


class Operators:
    """rwkv_peft::OP_forward(*inputs, state, cu_seqlens, save, backend) -> y, final state, checkpoints and
    rwkv_peft::OP_backward(*inputs, state, cu_seqlens, checkpoints, gy, gfinal, backend) -> the gradients of the inputs
    and the state. `backend` is one that `choose` has chosen, but not "reference". Only torch.compile, FakeTensor and
    the meta device call them, because an operator's dispatch costs more than a small call."""

    def __init__(self, signature: Signature, backend: Callable[[str], tuple[Backend, str]]) -> None:
        self._op, self._backend_of, self._count = signature.op, backend, len(signature.inputs)
        tensors = ", ".join((*(f"Tensor {name}" for name in signature.inputs), "Tensor? state", "Tensor? cu_seqlens"))
        gradients = ", ".join(["Tensor"] * (self._count + 1))
        saved = "Tensor checkpoints, Tensor? gy, Tensor? gfinal"
        forward, backward = f"{self._op}_forward", f"{self._op}_backward"
        _LIBRARY.define(f"{forward}({tensors}, bool save, str backend) -> (Tensor, Tensor, Tensor)")
        _LIBRARY.define(f"{backward}({tensors}, {saved}, str backend) -> ({gradients})")
        _LIBRARY.impl(forward, self._forward, "CompositeExplicitAutograd")
        _LIBRARY.impl(backward, self._backward, "CompositeExplicitAutograd")
        self.forward, self.backward = (getattr(torch.ops.rwkv_peft, name) for name in (forward, backward))
        forward, backward = f"{NAMESPACE}::{forward}", f"{NAMESPACE}::{backward}"
        torch.library.register_fake(forward, self._forward_fake, lib=_LIBRARY)
        torch.library.register_fake(backward, self._backward_fake, lib=_LIBRARY)
        torch.library.register_autograd(forward, self._differentiate, setup_context=self._save, lib=_LIBRARY)

    def _forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, save, chosen = arguments
        r, cu_seqlens = tensors[0], tensors[-1]
        if cu_seqlens is not None:  # in a compiled graph, nobody has checked the values yet
            check_bounds(self._op, cu_seqlens, r.shape[1])
        backend, level = self._backend_of(chosen)
        return backend.forward(*tensors, save=save, level=level)

    def _backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, chosen = arguments
        backend, level = self._backend_of(chosen)
        return backend.backward(*tensors, level=level)

    def _forward_fake(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, save, chosen = arguments
        r, sequences = tensors[0], sequences_of(tensors[0], tensors[-1])
        count = self._backend_of(chosen)[0].checkpoint_count(r, sequences) if save else 0
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


def _states_like(r: Tensor, count: int) -> Tensor:
    _, _, H, N = r.shape
    return r.new_empty(count, H, N, N, dtype=torch.float32)
