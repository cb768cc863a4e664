"""The tensors that a recurrence takes, and the checks that they fit; kernels' arguments follow from the signature."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Signature:
    """An operation's inputs in the order of its arguments; a state and cu_seqlens follow them."""

    op: str
    rows: tuple[str, ...]  # the names of the inputs (B, T, H, N), "v" among them
    shared: tuple[str, ...]  # the names of the inputs (H, N), which follow; float32 for the kernels
    state_rows: str  # the dimension that the rows of a state (H, N, N) stand for, "key" or "value"

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The names of all inputs."""
        return self.rows + self.shared

    @cached_property
    def gradients(self) -> tuple[str, ...]:
        """The names of the inputs' gradients."""
        return tuple(f"g{name}" for name in self.inputs)


def sequences_of(rows: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of sequences in a call, given one of its tensors (B, T, H, N)."""
    return rows.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def one_by_one(
    recurrence: Callable[..., tuple[Tensor, Tensor]],
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    state: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """y (1, T, H, N) and the final states of recurrence(*rows, *shared, state), run over one sequence after another.

    rows: tensors (1, T, H, N) of n sequences with the bounds cu_seqlens (n + 1,); state (n, H, N, N) or None.
    """
    bounds = cu_seqlens.tolist()
    ys, finals = [], []
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        parts, initial = [x[:, start:end] for x in rows], None if state is None else state[n : n + 1]
        y, final = recurrence(*parts, *shared, initial)
        ys.append(y)
        finals.append(final)
    return torch.cat(ys, dim=1), torch.cat(finals)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 128


def check(signature: Signature, inputs: Sequence[Tensor], state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Check the arguments -> v, which has the shape, device and dtype of the call. Raises ValueError, with the value,
    the rule and the remedy, if the arguments do not fit together."""
    op, rows = signature.op, signature.rows
    v = inputs[rows.index("v")]
    shape, device = v.shape, v.device
    if len(shape) != 4:
        raise ValueError(f"{op}: v has shape {tuple(shape)}; it must be (B, T, H, N): view it so")
    B, T, H, N = shape
    for name, x in zip(rows, inputs):
        if x.shape != shape:
            raise ValueError(
                f"{op}: {name} is {tuple(x.shape)} and v {tuple(shape)}; {' '.join(rows)} share one (B, T, H, N)"
            )
    if T == 0 or B == 0 or H == 0:
        raise ValueError(f"{op}: v is {tuple(shape)}; B, T and H must be at least 1: skip the call for an empty batch")
    if N % 4 or not 0 < N <= MAX_HEAD_SIZE:
        raise ValueError(
            f"{op}: head size {N}; it must be a multiple of 4, from 4 to {MAX_HEAD_SIZE}: "
            "set head_size to one such as 64"
        )
    count = B if cu_seqlens is None else _check_cu_seqlens(op, cu_seqlens, B, T)
    if state is not None and state.shape != (count, H, N, N):
        raise ValueError(
            f"{op}: state is {tuple(state.shape)}; it must be one (N, N) a sequence and head, rows the "
            f"{signature.state_rows} dimension: {(count, H, N, N)}; expand a shared state over the sequences"
        )
    for name, tensor in zip((*signature.inputs, "state", "cu_seqlens"), (*inputs, state, cu_seqlens)):
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} and v on {device}; move it with {name}.to({str(device)!r})"
            )
        if name != "cu_seqlens" and tensor.dtype not in DTYPES:
            raise ValueError(f"{op}: {name} is {tensor.dtype}; it must be a float type: convert it with {name}.float()")
    for name, x in zip(signature.shared, inputs[len(rows) :]):
        if x.shape != shape[2:]:
            raise ValueError(f"{op}: {name} is {tuple(x.shape)}; it must be (H, N) = {tuple(shape[2:])}: view it so")
    return v


def _check_cu_seqlens(op: str, cu_seqlens: Tensor, B: int, T: int) -> int:
    """The number of sequences that cu_seqlens packs into the one row of T tokens."""
    if not isinstance(cu_seqlens, Tensor):
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


def _has_values(x: Tensor) -> bool:
    """True if x is a real tensor rather than a fake or meta one."""
    return type(x) is Tensor and x.device.type != "meta"


def check_bounds(op: str, cu_seqlens: Tensor, T: int) -> None:
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
    _remember(cu_seqlens, bounds)


def vouch(copy: Tensor, cu_seqlens: Tensor, T: int) -> None:
    """Check cu_seqlens on the CPU for its copy on a GPU, which is then not read. Raises check_bounds' ValueError."""
    check_bounds("packing", cu_seqlens, T)
    _remember(copy, cu_seqlens.tolist())


def bounds_on_host(cu_seqlens: Tensor) -> list[int]:
    """The values of a tensor that passed, without waiting for a GPU a second time. While a CUDA graph is recorded the
    remembered values are not used, because the graph must not depend on them: reading the tensor fails, as it should.
    """
    known: list[int] = getattr(cu_seqlens, "_bounds", [])
    recorded = cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()
    if known and not recorded and getattr(cu_seqlens, "_checked_bounds", None) == _mark(cu_seqlens, known[-1]):
        return known
    return cu_seqlens.tolist()


def as_int64(cu_seqlens: Tensor, T: int) -> Tensor:
    """cu_seqlens as the kernels take it; the copy of a tensor that passed counts as passed, too."""
    plain = cu_seqlens.to(torch.int64).contiguous()
    converted = plain is not cu_seqlens and not torch.compiler.is_compiling()
    if converted and getattr(cu_seqlens, "_checked_bounds", None) == _mark(cu_seqlens, T):
        plain._checked_bounds = _mark(plain, T)  # type: ignore[attr-defined]
        plain._bounds = getattr(cu_seqlens, "_bounds", [])  # type: ignore[attr-defined]
    return plain


def _remember(cu_seqlens: Tensor, bounds: list[int]) -> None:
    """Store on a GPU's tensor that it passed, and its values."""
    if cu_seqlens.device.type != "cpu":
        cu_seqlens._checked_bounds = _mark(cu_seqlens, bounds[-1])  # type: ignore[attr-defined]
        cu_seqlens._bounds = bounds  # type: ignore[attr-defined]


def _mark(cu_seqlens: Tensor, T: int) -> tuple[int, int]:
    """The mark of a tensor that passed for T tokens; it differs once the tensor has been written to."""
    return T, 0 if cu_seqlens.is_inference() else cu_seqlens._version
