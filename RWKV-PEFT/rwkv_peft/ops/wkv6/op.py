"""wkv6: the one entry to the RWKV-6 recurrence. Checks its arguments and hands them to a backend."""

import functools
import logging
import warnings
from functools import partial

import torch
from torch import Tensor

from ..compiled import constant_when_compiled
from ..eager import Recurrence
from ..recurrence import as_int64, common_dtype, current_gpu, is_traced, plain, refuse_tangents, split_backend
from . import cpu, reference
from .checks import check
from .operators import backend_module

KERNELS = ("cpu", "cuda")


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RWKV-6's recurrence (Peng et al. 2024, arXiv 2404.05892, eq. 19): y_t = r_tᵀ (S_{t-1} + diag(u) k_t v_tᵀ),
    S_t = diag(exp(-exp(w_t))) S_{t-1} + k_t v_tᵀ.

    r k v w (B, T, H, N), w before the two exponentials; u (H, N); state (B, H, N, N), rows the key dimension, or None
    for zeros -> y (B, T, H, N) in v's dtype, final state (B, H, N, N) float32. With cu_seqlens (n + 1,), int32 or
    int64, B is 1, the row holds n sequences bounded by its entries, and the states are (n, H, N, N).

    Kernels compute in float32, but for one case that is much less work: on a GPU, where r k v w are all bfloat16 and N
    is 32 or 64 (forward: or 128), products take bfloat16 operands, with float32 sums and state.

    Differentiable once in r k v w u and state, through both outputs. backend: "auto" takes the kernel of the tensors'
    device ("cpu", "cuda") where it can be used, else "reference", and says so once; a named backend is never replaced.
    "cpu:avx512bf16", "cpu:avx512", "cpu:avx2" and "cpu:portable" name the CPU kernel's instruction set. float64 needs
    "reference", which "auto" takes for it, and so does forward-mode differentiation. Raises ValueError where arguments
    do not fit, RuntimeError where a named backend is unusable, NotImplementedError for a kernel's forward mode.
    """
    check(r, k, v, w, u, state, cu_seqlens)
    dtype = common_dtype(v, r, k, w)
    chosen = _choose(backend, v.device.type, v.device.index, dtype)
    if chosen == "reference":
        return reference.wkv6(r, k, v, w, u, state, cu_seqlens)
    level = chosen.partition(":")[2]

    out_dtype = v.dtype
    kernel_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    r, k, v, w = (plain(x, kernel_dtype) for x in (r, k, v, w))
    u = plain(u, torch.float32)
    state = None if state is None else plain(state, torch.float32)
    cu_seqlens = None if cu_seqlens is None else as_int64(cu_seqlens, v.shape[1])
    inputs = (r, k, v, w, u) if state is None else (r, k, v, w, u, state)
    refuse_tangents("wkv6", inputs, chosen)
    save = torch.is_grad_enabled() and any([x.requires_grad for x in inputs])
    arguments = (r, k, v, w, u, state, cu_seqlens)
    if is_traced(v):
        y, final_state, _ = torch.ops.rwkv_peft.wkv6_forward(*arguments, save, level)
    elif save:
        module = backend_module(v.device.type)
        forward, backward = partial(module.forward, save=True, level=level), partial(module.backward, level=level)
        y, final_state = Recurrence.apply("wkv6", forward, backward, *arguments)
    else:
        y, final_state, _ = backend_module(v.device.type).forward(*arguments, save=save, level=level)
    return y.to(out_dtype), final_state


def backends() -> dict[str, str | None]:
    """Every backend's name -> None where it can be used here, else the reason and the remedy. May compile them."""
    return {"reference": None, **{name: backend_module(name).unavailable() for name in KERNELS}}


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
    name, level = split_backend("wkv6", backend, KERNELS)
    reason = cpu.unavailable(level) if name == "cpu" else backend_module(name).unavailable()
    if reason is not None:
        raise RuntimeError(f"wkv6: backend {backend!r} cannot be used: {reason}")
    if device_type not in (name, "meta"):
        raise ValueError(f"wkv6: backend {name!r} with tensors on {device_type}; move them to {name}, or take 'auto'")
    if dtype == torch.float64:
        raise ValueError(f"wkv6: backend {name!r} computes in float32, not {dtype}; convert, or take 'reference'")
    return backend


def _resolve_auto(device_type: str, dtype: torch.dtype) -> str:
    log = logging.getLogger(__name__)
    if dtype == torch.float64:
        return "reference"
    if device_type == "meta":
        return "cpu"
    reason = f"there is no kernel for {device_type}"
    if device_type in KERNELS:
        reason = backend_module(device_type).unavailable()
    if reason is None:
        log.info("wkv6 takes backend %r", device_type)
        return device_type
    warnings.warn(
        f"wkv6 takes backend 'reference', which is slow, for tensors on {device_type}: {reason}",
        RuntimeWarning,
        stacklevel=5,
    )
    return "reference"
