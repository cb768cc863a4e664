"""What the recurrences wkv6 and wkv7 share at their entry: the rules of their arguments, and conversions."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import forward_ad

from .native.levels import LEVELS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 128


def check(
    op: str,
    sequences: Mapping[str, torch.Tensor],
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    state_rows: str,
    others: Mapping[str, torch.Tensor],
) -> None:
    """Raise ValueError, with the value, the rule and the remedy, where the arguments of `op` do not fit together.

    sequences: its (B, T, H, N) tensors by name, v among them; others: further tensors of floats. state_rows: which
    dimension a state's rows are, "key" or "value".
    """
    v = sequences["v"]
    if v.dim() != 4:
        raise ValueError(f"{op}: v has shape {tuple(v.shape)}; it must be (B, T, H, N): view it so")
    B, T, H, N = v.shape
    for name, x in sequences.items():
        if x.shape != v.shape:
            raise ValueError(
                f"{op}: {name} is {tuple(x.shape)} and v {tuple(v.shape)}; {' '.join(sequences)} share one (B, T, H, N)"
            )
    if T == 0 or B == 0 or H == 0:
        raise ValueError(
            f"{op}: v is {tuple(v.shape)}; B, T and H must be at least 1: skip the call for an empty batch"
        )
    if N % 4 or not 0 < N <= MAX_HEAD_SIZE:
        raise ValueError(
            f"{op}: head size {N}; it must be a multiple of 4, from 4 to {MAX_HEAD_SIZE}: "
            "set head_size to one such as 64"
        )
    count = B if cu_seqlens is None else _check_cu_seqlens(op, cu_seqlens, B, T)
    if state is not None and state.shape != (count, H, N, N):
        raise ValueError(
            f"{op}: state is {tuple(state.shape)}; it must be one (N, N) a sequence and head, rows the {state_rows} "
            f"dimension: {(count, H, N, N)}; expand a shared state over the sequences"
        )
    for name, tensor in {**sequences, **others, "state": state, "cu_seqlens": cu_seqlens}.items():
        if tensor is None:
            continue
        if tensor.device != v.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} and v on {v.device}; move it with {name}.to({str(v.device)!r})"
            )
        if name != "cu_seqlens" and tensor.dtype not in DTYPES:
            raise ValueError(f"{op}: {name} is {tensor.dtype}; it must be a float type: convert it with {name}.float()")


def _check_cu_seqlens(op: str, cu_seqlens: torch.Tensor, B: int, T: int) -> int:
    """The number of sequences that cu_seqlens packs into the one row of T tokens."""
    if not isinstance(cu_seqlens, torch.Tensor):
        raise ValueError(
            f"{op}: cu_seqlens is a {type(cu_seqlens).__name__}; give a tensor, torch.tensor([0, ..., {T}])"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"{op}: cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; it must be (n + 1,) int32 or int64, "
            f"the bounds of n sequences: [0, ..., {T}]"
        )
    if B != 1:
        raise ValueError(f"{op}: B is {B} with cu_seqlens; packed sequences share one row: reshape to (1, B * T, H, N)")
    if not torch.compiler.is_compiling() and _has_values(cu_seqlens):
        check_bounds(op, cu_seqlens, T)
    return len(cu_seqlens) - 1


def _has_values(x: torch.Tensor) -> bool:
    """Whether x is a real tensor rather than a fake or meta one."""
    return type(x) is torch.Tensor and x.device.type != "meta"


def check_bounds(op: str, cu_seqlens: torch.Tensor, T: int) -> None:
    """Raise ValueError unless cu_seqlens bounds sequences of T tokens in all.

    Reading a GPU's tensor waits for the GPU, so such a tensor remembers that it passed, as long as nobody writes to it.
    """
    if getattr(cu_seqlens, "_checked_bounds", None) == _mark(cu_seqlens, T):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or any(a >= b for a, b in zip(bounds, bounds[1:])):
        shown = bounds if len(bounds) <= 12 else f"[{bounds[0]}, {bounds[1]}, ..., {bounds[-1]}]"
        raise ValueError(
            f"{op}: cu_seqlens is {shown} for {T} tokens; it must start at 0, increase, and end at {T}: "
            "drop empty sequences and count the padding as one"
        )
    if cu_seqlens.device.type != "cpu":
        cu_seqlens._checked_bounds = _mark(cu_seqlens, T)  # type: ignore[attr-defined]


def vouch(copy: torch.Tensor, cu_seqlens: torch.Tensor, T: int) -> None:
    """Spare a GPU's copy of cu_seqlens, which lies on the CPU, the reading of check_bounds. Raises its ValueError."""
    check_bounds("packing", cu_seqlens, T)
    if copy.device.type != "cpu":
        copy._checked_bounds = _mark(copy, T)  # type: ignore[attr-defined]


def as_int64(cu_seqlens: torch.Tensor, T: int) -> torch.Tensor:
    """cu_seqlens as the kernels take it; a converted copy of a tensor that passed has passed, too."""
    plain = cu_seqlens.to(torch.int64).contiguous()
    converted = plain is not cu_seqlens and not torch.compiler.is_compiling()
    if converted and getattr(cu_seqlens, "_checked_bounds", None) == _mark(cu_seqlens, T):
        plain._checked_bounds = _mark(plain, T)  # type: ignore[attr-defined]
    return plain


def _mark(cu_seqlens: torch.Tensor, T: int) -> tuple[int, int]:
    """What a tensor that bounds sequences of T tokens remembers, as long as nobody writes to it."""
    return T, 0 if cu_seqlens.is_inference() else cu_seqlens._version


def plain(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as the kernels take it."""
    return x.to(dtype).contiguous()


def common_dtype(first: torch.Tensor, *others: torch.Tensor) -> torch.dtype:
    """The dtype that holds all: under autocast the decay is float32 beside bfloat16 projections."""
    dtype = first.dtype
    for x in others:
        if x.dtype != dtype:
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def is_traced(x: torch.Tensor) -> bool:
    """Whether x stands for a tensor under torch.compile, FakeTensor or the meta device: the operator must be seen.
    Elsewhere generation's single steps go straight to the kernel, as calling the operator costs as much as a small one.
    """
    return torch.compiler.is_compiling() or type(x) is not torch.Tensor or x.device.type == "meta"


def current_gpu(device_type: str, index: int | None) -> AbstractContextManager[object]:
    """Makes a GPU the current one, which is what backends are asked about; nothing for other devices."""
    return torch.cuda.device(index) if device_type == "cuda" and index is not None else nullcontext()


def split_backend(op: str, backend: str, names: Sequence[str]) -> tuple[str, str]:
    """A named backend -> its name and, of "cpu:LEVEL", the instruction set, else "". Raises ValueError for one that is
    neither among `names` nor such."""
    name, _, level = str(backend).partition(":")
    if name not in names or (level and (name != "cpu" or level not in LEVELS)):
        known = ", ".join(("auto", "reference", *names, *(f"cpu:{level}" for level in LEVELS)))
        raise ValueError(f"{op}: backend {backend!r} is unknown; take one of {known}")
    return name, level


def refuse_tangents(op: str, inputs: Sequence[torch.Tensor], backend: str) -> None:
    """Raise NotImplementedError where an input carries a tangent, which the kernels would drop."""
    if getattr(forward_ad, "_current_level", -1) < 0 or torch.compiler.is_compiling():
        return
    if any([forward_ad.unpack_dual(x).tangent is not None for x in inputs]):
        raise NotImplementedError(
            f"{op}: backend {backend!r} has no forward-mode derivative; take backend='reference', or differentiate "
            "backward"
        )
