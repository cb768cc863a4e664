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
    op, v = signature.op, inputs[signature.rows.index("v")]
    if v.dim() != 4 or 0 in v.shape:
        raise ValueError(f"{op}: v has shape {tuple(v.shape)}; it must be (B, T, H, N), all at least 1: view it so")
    B, T, H, N = v.shape
    if N % 4 or N > MAX_HEAD_SIZE:
        raise ValueError(
            f"{op}: head size {N}; it must be a multiple of 4, from 4 to {MAX_HEAD_SIZE}: "
            "set head_size to one such as 64"
        )
    sequences = B if cu_seqlens is None else _check_cu_seqlens(op, cu_seqlens, B, T)
    expected: dict[str, tuple[int, ...] | None] = {**dict.fromkeys(signature.rows, v.shape)}
    expected |= {**dict.fromkeys(signature.shared, (H, N)), "state": (sequences, H, N, N), "cu_seqlens": None}
    for (name, shape), x in zip(expected.items(), (*inputs, state, cu_seqlens)):
        if x is None:
            continue
        if shape is not None and x.shape != shape:
            raise ValueError(
                f"{op}: {name} is {tuple(x.shape)} and v {tuple(v.shape)}, with which it must be {tuple(shape)}: "
                "view or expand it so"
            )
        if x.device != v.device or shape is not None and x.dtype not in DTYPES:
            raise ValueError(
                f"{op}: {name} is {x.dtype} on {x.device}, and v's device is {v.device}; convert it with "
                f"{name}.to({str(v.device)!r}), and integers with {name}.float()"
            )
    return v


def _check_cu_seqlens(op: str, cu_seqlens: Tensor, B: int, T: int) -> int:
    """The number of sequences that cu_seqlens packs into the one row of T tokens."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or B != 1:
        raise ValueError(
            f"{op}: cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} beside {B} rows; it must be (n + 1,) "
            f"int32 or int64, the bounds of n sequences in one row, [0, ..., {T}]: reshape to (1, B * T, H, N)"
        )
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
    if _remembered(cu_seqlens, T) is not None:
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or any(a >= b for a, b in zip(bounds, bounds[1:])):
        shown = bounds if len(bounds) <= 12 else f"[{bounds[0]}, {bounds[1]}, ..., {bounds[-1]}]"
        raise ValueError(
            f"{op}: cu_seqlens is {shown} for {T} tokens; it must start at 0, increase, and end at {T}: "
            "drop empty sequences and count the padding as one"
        )
    _remember(cu_seqlens, bounds)


def check_copy(copy: Tensor, cu_seqlens: Tensor, T: int) -> None:
    """Check cu_seqlens on the CPU for its copy on a GPU, which is then not read. Raises check_bounds' ValueError."""
    check_bounds("packing", cu_seqlens, T)
    _remember(copy, cu_seqlens.tolist())


def bounds_on_host(cu_seqlens: Tensor) -> list[int]:
    """The values of a tensor, without waiting for a GPU if it passed before."""
    known = _remembered(cu_seqlens)
    return cu_seqlens.tolist() if known is None else known


def as_int64(cu_seqlens: Tensor, T: int) -> Tensor:
    """cu_seqlens as the kernels take it; the copy of a tensor that passed counts as passed, too."""
    plain = cu_seqlens.to(torch.int64).contiguous()
    known = None if plain is cu_seqlens or torch.compiler.is_compiling() else _remembered(cu_seqlens, T)
    if known is not None:
        _remember(plain, known)
    return plain


def _remember(cu_seqlens: Tensor, bounds: list[int]) -> None:
    """Store on a GPU's tensor its values, which passed."""
    if cu_seqlens.device.type != "cpu":
        cu_seqlens._bounds = (_version(cu_seqlens), bounds)  # type: ignore[attr-defined]


def _remembered(cu_seqlens: Tensor, T: int | None = None) -> list[int] | None:
    """The values that _remember stored, for T tokens if it is given; None after the tensor has been written to."""
    version, bounds = getattr(cu_seqlens, "_bounds", (None, None))
    fits = bounds is not None and version == _version(cu_seqlens) and T in (None, bounds[-1])
    return bounds if fits else None


def _version(x: Tensor) -> int:
    """A number that differs once a tensor has been written to."""
    return 0 if x.is_inference() else x._version
