"""wkv7: the one entry to the RWKV-7 recurrence. Checks its arguments and hands them to a backend."""

import functools
import logging
import warnings
from functools import partial

import torch
from torch import Tensor

from ..compiled import constant_when_compiled
from ..eager import Recurrence
from ..recurrence import as_int64, common_dtype, current_gpu, is_traced, plain, refuse_tangents, split_backend
from . import reference
from .checks import check
from .operators import backend_module, call_backward, call_forward

KERNELS = ("cpu", "cuda")
BACKENDS = ("chunked", *KERNELS)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RWKV-7's recurrence ("Goose", Peng et al. 2025, arXiv 2503.14456): y_t = S_t r_t,
    S_t = S_{t-1} diag(exp(-e^(-1/2) sigmoid(w_t))) + (S_{t-1} a_t) b_tᵀ + v_t k_tᵀ.

    r w k v a b (B, T, H, N), w before the sigmoid; state (B, H, N, N), rows the value dimension (in wkv6 the key
    dimension), or None for zeros -> y (B, T, H, N) in v's dtype, final state (B, H, N, N) float32. With cu_seqlens
    (n + 1,), int32 or int64, B is 1, the row holds n sequences bounded by its entries, and the states are (n, H, N, N).

    Differentiable once in r w k v a b and state, through both outputs. backend: "auto" takes the kernel of the tensors'
    device ("cpu", "cuda") where it can be used, else "chunked", products of matrices in plain torch on any device, and
    says so once; a named backend is never replaced. "cpu:avx512bf16", "cpu:avx512", "cpu:avx2" and "cpu:portable" name
    the CPU kernel's instruction set. All compute in float32, but for one case that is much less work: on a GPU, where
    r w k v a b are all bfloat16 and N is 64, products take bfloat16 operands, with float32 sums and state. float64
    needs "reference", one step at a time, which "auto" takes for it, and so does forward-mode differentiation. Raises
    ValueError where arguments do not fit, RuntimeError where a named backend is unusable, NotImplementedError for
    forward mode of another backend than "reference".
    """
    check(r, w, k, v, a, b, state, cu_seqlens)
    dtype = common_dtype(v, r, w, k, a, b)
    chosen = _choose(backend, v.device.type, v.device.index, dtype)
    if chosen == "reference":
        return reference.wkv7(r, w, k, v, a, b, state, cu_seqlens)

    out_dtype = v.dtype
    kernel_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    r, w, k, v, a, b = inputs = tuple(plain(x, kernel_dtype) for x in (r, w, k, v, a, b))
    state = None if state is None else plain(state, torch.float32)
    cu_seqlens = None if cu_seqlens is None else as_int64(cu_seqlens, v.shape[1])
    inputs = inputs if state is None else (*inputs, state)
    refuse_tangents("wkv7", inputs, chosen)
    save = torch.is_grad_enabled() and any([x.requires_grad for x in inputs])
    arguments = (r, w, k, v, a, b, state, cu_seqlens)
    if is_traced(v):
        y, final_state, _ = torch.ops.rwkv_peft.wkv7_forward(*arguments, save, chosen)
    elif save:
        forward, backward = partial(call_forward, save=True, backend=chosen), partial(call_backward, backend=chosen)
        y, final_state = Recurrence.apply("wkv7", forward, backward, *arguments)
    else:
        y, final_state, _ = call_forward(*arguments, save, chosen)
    return y.to(out_dtype), final_state


def backends() -> dict[str, str | None]:
    """Every backend's name -> None where it can be used here, else the reason and the remedy. May compile them."""
    return {"reference": None, **{name: backend_module(name).unavailable() for name in BACKENDS}}


@constant_when_compiled
def _choose(backend: str, device_type: str, index: int | None, dtype: torch.dtype) -> str:
    """_resolve, as a constant of a compiled graph."""
    return _resolve(backend, device_type, index, dtype)


@functools.cache
def _resolve(backend: str, device_type: str, index: int | None, dtype: torch.dtype) -> str:
    """The backend to call: `backend` itself, or what "auto" means for this device (GPUs differ) and dtype."""
    with current_gpu(device_type, index):
        return _resolve_here(backend, device_type, dtype)


def _resolve_here(backend: str, device_type: str, dtype: torch.dtype) -> str:
    if backend == "auto":
        return _resolve_auto(device_type, dtype)
    if backend == "reference":
        return backend
    name, level = split_backend("wkv7", backend, BACKENDS)
    reason = backend_module(name).unavailable(level)
    if reason is not None:
        raise RuntimeError(f"wkv7: backend {backend!r} cannot be used: {reason}")
    if name in KERNELS and device_type not in (name, "meta"):
        raise ValueError(f"wkv7: backend {name!r} with tensors on {device_type}; move them to {name}, or take 'auto'")
    if dtype == torch.float64:
        raise ValueError(f"wkv7: backend {backend!r} computes in float32, not {dtype}; convert, or take 'reference'")
    return backend


def _resolve_auto(device_type: str, dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "reference"
    if device_type == "meta":  # where a GPU's memory is planned
        return "cuda"
    reason = f"there is no kernel for {device_type}"
    if device_type in KERNELS:
        reason = backend_module(device_type).unavailable()
    if reason is not None:
        warnings.warn(f"wkv7 takes backend 'chunked', which is slow: {reason}", RuntimeWarning, stacklevel=5)
    chosen = device_type if reason is None else "chunked"
    logging.getLogger(__name__).info("wkv7 takes backend %r for tensors on %s", chosen, device_type)
    return chosen
