"""The mix operations' autograd Functions over cpu/mix and cuda/mix: operations.py's table of them, and token shift with
interpolation, including the weights' low-rank product.

Tensors are contiguous and share one dtype, float32 or bfloat16; __init__.py ensures that. On a GPU the kernels of
cuda/mix/low_rank.cuh include the low-rank product; they serve if they take the tensors, and in backward if `up` and maa
are also frozen. Otherwise it is a matrix product beside the kernels of cuda/mix/lerp.cuh.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from ..native.calls import Operator, differentiable_once
from ..products import matmul
from . import cpu, cuda
from .operations import OPERATIONS, Operation, class_name

Item = TypeVar("Item")


def call(name: str, like: Tensor, tensors: Mapping[str, Tensor], **sizes: Any) -> None:
    """Run an operation, such as "relu_square_forward", where `like` is, on tensors by name."""
    (cuda.call if like.is_cuda else cpu.call)(name, like, tensors, **sizes)


compute = Operator("mix", lambda *given, **sizes: call(*given, **sizes))


class _NoGradient:
    """Stands in for an autograd context if nothing will be differentiated."""

    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Save nothing."""


def run(function: type[Function], *arguments: Any) -> Any:
    """function.apply(*arguments); without gradients no autograd, which on one token costs several kernels."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NoGradient(), *arguments)


def numbered(kind: str, tensors: Iterable[Item]) -> dict[str, Item]:
    """Name several tensors of a kind as layouts do: out0, out1, …"""
    return {f"{kind}{i}": x for i, x in enumerate(tensors)}


def rows_of(x: Tensor) -> dict[str, int]:
    """The sizes of x (…, C) that a kernel needs."""
    return dict(tokens=x.shape[:-1].numel(), channels=x.shape[-1])


def rounded(sums: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Convert parameters' gradients, which are float32 sums over tokens, to a dtype; None stays."""
    return [None if x is None else x.to(dtype) for x in sums]


def _function(name: str, op: Operation) -> type[Function]:
    """The Function of an operation: eps or None, its inputs and its parameters -> its outputs."""

    def forward(ctx: Any, eps: float | None, *given: Tensor) -> Tensor | tuple[Tensor, ...]:
        outs = tuple(torch.empty_like(given[len(op.inputs) - 1]) for _ in op.outputs)
        ctx.save_for_backward(*(outs if op.from_result else given))
        ctx.sizes = _sizes(op, given[0], eps)
        read = dict(zip(op.inputs + op.parameters, given))
        compute(f"{name}_forward", read, dict(zip(op.outputs, outs)), **ctx.sizes)
        return outs if len(outs) > 1 else outs[0]

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in saved[: len(op.inputs)]]
        parameters = saved[len(op.inputs) :]
        wanted = any(ctx.needs_input_grad[1 + len(op.inputs) :])
        sums = [torch.empty_like(x, dtype=torch.float32) if wanted else None for x in parameters]
        of_outputs, *names = op.gradients
        read = dict(zip(op.saved + of_outputs, (*saved, *grads)))
        written = dict(zip(names[0] + names[1], (*gradients, *sums)))
        compute(f"{name}_backward", read, written, **ctx.sizes)
        return None, *gradients, *rounded(sums, saved[0].dtype)

    ways = {"forward": staticmethod(forward), "backward": staticmethod(differentiable_once(backward))}
    return type(class_name(name), (Function,), ways)


def _sizes(op: Operation, like: Tensor, eps: float | None) -> dict[str, Any]:
    return (head_sizes(like) if op.by_head else rows_of(like)) | ({} if eps is None else dict(eps=eps))


def head_sizes(like: Tensor) -> dict[str, int]:
    """The sizes of a tensor (B, T, H, N) that a kernel needs."""
    B, T, H, N = like.shape
    return dict(tokens=B * T, channels=H * N, size=N)


KERNELS: Mapping[str, type[Function]] = MappingProxyType({name: _function(name, op) for name, op in OPERATIONS.items()})


class CpuLerp(Function):
    """x (B, T, C), last (n, C), maa (m, C), low (B, T, m K), up (m, K, C), cu_seqlens int64 -> m times (B, T, C)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        last: Tensor | None,
        maa: Tensor,
        low: Tensor | None,
        up: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, last, maa, low, up, cu_seqlens)
        outs = tuple(torch.empty_like(x) for _ in range(maa.shape[0]))
        read = dict(x=x, last=last, maa=maa, low=low, up=up, cu_seqlens=cu_seqlens)
        compute("lerp_forward", read, numbered("out", outs), **sizes_of(x, maa, cu_seqlens), rank=rank_of(up))
        return outs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, last, maa, low, up, cu_seqlens = ctx.saved_tensors
        need_x, need_last, need_maa, need_low, need_up = ctx.needs_input_grad[:5]
        gx = torch.empty_like(x) if need_x else None
        glast = torch.zeros_like(last) if need_last else None
        gmaa = torch.empty_like(maa, dtype=torch.float32) if need_maa else None
        glow = torch.empty_like(low) if need_low else None
        gup = torch.empty_like(up, dtype=torch.float32) if need_up else None
        read = dict(x=x, last=last, maa=maa, low=low, up=up, cu_seqlens=cu_seqlens) | numbered("grad", grads)
        written = dict(gx=gx, glast=glast, gmaa=gmaa, glow=glow, gup=gup)
        compute("lerp_backward", read, written, **sizes_of(x, maa, cu_seqlens), rank=rank_of(up))
        gmaa, gup = rounded((gmaa, gup), x.dtype)
        return gx, glast, gmaa, glow, gup, None


BLOCKS, MOST_GROUPS = 256, 8  # blocks that fill any GPU; the most parts of a sum over channels


class GpuLerp(Function):
    """x (B, T, C), last (n, C), maa (m, C), low (B, T, m K), up (m, K, C), cu_seqlens int64 -> m times (B, T, C)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        last: Tensor | None,
        maa: Tensor,
        low: Tensor | None,
        up: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, last, maa, low, up, cu_seqlens)
        outs = tuple(torch.empty_like(x) for _ in range(maa.shape[0]))
        read = dict(x=x, maa=maa, last=last, bounds=cu_seqlens)
        written, sizes = numbered("out", outs), sizes_of(x, maa, cu_seqlens) | dict(length=x.shape[1])
        if has_product_inside(x, up):
            compute("lerp_low_forward", read | dict(low=low, up=up), written, size=group_size(x), **sizes)
        else:
            compute("lerp_forward", read | dict(offsets=offsets(low, up)), written, **sizes)
        return outs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, last, maa, low, up, cu_seqlens = ctx.saved_tensors
        gx, glast = torch.empty_like(x), None if last is None else torch.empty_like(last)
        read = dict(maa=maa, last=last, bounds=cu_seqlens) | numbered("grad", grads)
        written, sizes = dict(gx=gx, glast=glast), sizes_of(x, maa, cu_seqlens) | dict(length=x.shape[1])
        trained = ctx.needs_input_grad[2] or ctx.needs_input_grad[4]
        if not trained and has_product_inside(x, up):
            parts = low.new_empty(-(-x.shape[2] // group_size(x)), *low.shape)  # by groups of channels
            read, written = read | dict(x=x, low=low, up=up), written | dict(glow=parts)
            compute("lerp_low_backward", read, written, size=group_size(x), **sizes)
            return gx, glast, None, parts.sum(0) if len(parts) > 1 else parts[0], None, None
        goffsets = None if low is None else x.new_empty(maa.shape[0], x[..., 0].numel(), x.shape[2])
        gmaa = torch.empty_like(maa, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        read |= dict(x=None if goffsets is None and gmaa is None else x, offsets=offsets(low, up))
        written |= dict(goffsets=goffsets) | ({} if gmaa is None else numbered("gmaa", gmaa))
        compute("lerp_backward", read, written, **sizes)
        glow = gup = None
        if goffsets is not None:
            glow = (goffsets @ up.mT).transpose(0, 1).reshape(low.shape)
            gup = _by_point(low, up).mT @ goffsets if ctx.needs_input_grad[4] else None
        return gx, glast, *rounded([gmaa], x.dtype), glow, gup, None


def rank_of(up: Tensor | None) -> int:
    """The rank K of up (m, K, C); 0 for None."""
    return 0 if up is None else up.shape[1]


def has_product_inside(x: Tensor, up: Tensor | None) -> bool:
    """True if kernels with the low-rank product inside take these, which are whole tiles."""
    return (
        up is not None
        and x.dtype == torch.bfloat16
        and up.shape[0] == cuda.LOW_POINTS
        and up.shape[1] in cuda.LOW_RANKS
        and x.shape[2] % cuda.LOW_CHANNELS == 0
    )


def group_size(x: Tensor) -> int:
    """The number of channels of x (…, C) in one block, a multiple of LOW_CHANNELS: few enough to fill a GPU, and
    no fewer, because each block adds a part to the sums over channels."""
    tiles, channels = math.ceil(x[..., 0].numel() / (cuda.TILE_TOKENS - 1)), x.shape[-1]
    groups, step = min(MOST_GROUPS, -(-BLOCKS // tiles)), cuda.LOW_CHANNELS
    return -(-channels // (groups * step)) * step


def offsets(low: Tensor | None, up: Tensor | None) -> Tensor | None:
    """low_i up_i: (B, T, m K), (m, K, C) -> (m, B T, C); None if they are None."""
    return None if low is None or up is None else matmul(_by_point(low, up), up)


def _by_point(low: Tensor, up: Tensor) -> Tensor:
    """low (B, T, m K) -> (m, B T, K)."""
    m, K, _ = up.shape
    return low.reshape(-1, m, K).transpose(0, 1)


def sizes_of(x: Tensor, maa: Tensor, cu_seqlens: Tensor | None) -> dict[str, int]:
    """The sizes of x (B, T, C), points maa (m, C) and packed sequences that a kernel needs."""
    B, T, C = x.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return dict(tokens=B * T, channels=C, n=maa.shape[0], sequences=sequences)
