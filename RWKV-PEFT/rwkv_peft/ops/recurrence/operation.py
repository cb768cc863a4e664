"""A recurrence as an operation: checks its arguments, converts them for the kernels, and calls a backend."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import Backend, Backends
from .checks import as_int64, check
from .eager import Differentiable
from .operators import Operators
from .signature import Signature


class Recurrence:
    """The operation of a signature."""

    def __init__(
        self, signature: Signature, reference: Callable[..., tuple[Tensor, Tensor]], backends: Mapping[str, Backend]
    ) -> None:
        """reference: the operation in plain torch; backends as in Backends."""
        self.signature, self.reference, self.row_count = signature, reference, len(signature.rows)
        self.backends = Backends(signature.op, backends)
        self.operators = Operators(signature, self.backends)

    def compute(
        self, inputs: Sequence[Tensor], state: Tensor | None, cu_seqlens: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        """y in v's dtype, and the final state. Raises ValueError if arguments do not fit, RuntimeError if a named
        backend is unusable, NotImplementedError for forward-mode differentiation of any backend but "reference"."""
        v = check(self.signature, inputs, state, cu_seqlens)
        rows, shared = inputs[: self.row_count], inputs[self.row_count :]
        dtype, device = _common_dtype(rows), v.device
        chosen = self.backends.choose(backend, device.type, device.index, dtype)
        if chosen == "reference":
            return self.reference(*inputs, state, cu_seqlens)

        kernel_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        tensors = [_plain(x, kernel_dtype) for x in rows] + [_plain(x, torch.float32) for x in shared]
        state = None if state is None else _plain(state, torch.float32)
        cu_seqlens = None if cu_seqlens is None else as_int64(cu_seqlens, v.shape[1])
        leaves = tensors if state is None else [*tensors, state]
        _refuse_tangents(self.signature.op, leaves, chosen)
        save = torch.is_grad_enabled() and any([x.requires_grad for x in leaves])
        # Under torch.compile, FakeTensor or the meta device the operator must be seen. Other calls go straight to the
        # kernel, because on a single step of generation the operator costs as much again.
        if torch.compiler.is_compiling() or type(v) is not Tensor or v.device.type == "meta":
            y, final_state, _ = self.operators.forward(*tensors, state, cu_seqlens, save, chosen)
            return y.to(v.dtype), final_state
        kernels, level = self.backends[chosen]
        if save:
            y, final_state = Differentiable.apply(self.signature.op, kernels, level, *tensors, state, cu_seqlens)
        else:
            y, final_state, _ = kernels.forward(*tensors, state, cu_seqlens, save=False, level=level)
        return y.to(v.dtype), final_state


def _plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype, contiguous, as the kernels take it."""
    return x.to(dtype).contiguous()


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that all tensors are converted to: under autocast the decay is float32, the projections bfloat16."""
    dtype = tensors[0].dtype
    for x in tensors:
        if x.dtype != dtype:
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _refuse_tangents(op: str, inputs: Sequence[Tensor], backend: str) -> None:
    """Raise NotImplementedError if an input carries a tangent, which the kernels would drop."""
    if getattr(forward_ad, "_current_level", -1) < 0 or torch.compiler.is_compiling():
        return
    if any([forward_ad.unpack_dual(x).tangent is not None for x in inputs]):
        raise NotImplementedError(
            f"{op}: backend {backend!r} has no forward-mode derivative; take backend='reference', or differentiate "
            "backward"
        )
