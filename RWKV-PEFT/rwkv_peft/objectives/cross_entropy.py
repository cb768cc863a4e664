"""Cross-entropy of the head, and other losses of logits, in chunks so that the logits never exist as a whole.

At a vocabulary of 65,536 the logits and their gradient dwarf all else in memory. The gradient of the hidden state is
formed while a chunk's logits are at hand, as Liger Kernel does (Hsu et al. 2024, arXiv 2410.10989), so the backward
pass costs nothing more.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.cross_entropy import cross_entropy_
from ..ops.products import linear, matmul

CHUNK_ELEMENTS = 2**25  # logits alive at once: 128 MiB in float32
GPU_CHUNK_ELEMENTS = 2**27  # on a GPU, because few rows leave it idle: 256 MiB in bfloat16
L2WRAP = 1e-4  # RWKV-LM's pull on each token's largest logit, which keeps logits from drifting up


# (logits (n, V), which it may overwrite, the part of the counted tokens that these are of, whether the gradient is
# wanted) -> (sums over the tokens (k,), of which the first is the loss; the loss's gradient (n, V), or None)
Rule = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]


class ChunkedHead(torch.autograd.Function):
    """So many sums of a Rule over the counted tokens, `size` of them at a time: (sums,), float32 (float64 for float64
    input). The first, the loss, alone has a gradient; hidden, weight and counted are as in linear_cross_entropy."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, counted: Tensor, size: int, sums: int, rule: Rule) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])  # (B * T, C)
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        # float32 sums, also for a bfloat16 model: thousands of tokens add up here.
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_hidden = torch.zeros_like(rows) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if needs_weight else None
        total = torch.zeros(sums, dtype=accumulate, device=rows.device)
        for first in range(0, len(counted), size):
            part = slice(first, first + size)
            chunk = counted[part]
            inputs = rows[chunk]  # (n, C)
            losses, grad = rule(linear(inputs, weight), part, needs_hidden or needs_weight)  # (n, V)
            total += losses
            if grad_hidden is not None and grad is not None:
                grad_hidden[chunk] = matmul(grad, weight)
            if grad_weight is not None and grad is not None:
                grad_weight += matmul(grad.t(), inputs).to(accumulate)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.shape, ctx.weight_dtype = hidden.shape, weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_output[0]).view(ctx.shape)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_output[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def chunk_rows(vocabulary: int, on_gpu: bool) -> int:
    """The number of tokens in a chunk of logits."""
    return max(1, (GPU_CHUNK_ELEMENTS if on_gpu else CHUNK_ELEMENTS) // vocabulary)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    counted: Tensor,
    count: float | Tensor,
    l2wrap: float = L2WRAP,
    weights: Tensor | None = None,
    parts: Tensor | None = None,
) -> Tensor:
    """Sum of the counted tokens' cross-entropy, each times its own of weights (B, T) if they are given, divided by
    `count`.

    hidden (B, T, C), weight (V, C) of the same dtype, targets (B, T) int64, counted (n,) int64: the positions, in
    B * T, of the targets that count; only they need logits;
    count: the number of counted tokens in the average, or the sum of their weights, above 0: a number or a 0-dim
    tensor, of a whole optimizer step over all ranks and micro batches. Returns a float32 scalar (float64 for float64
    input).
    l2wrap adds l2wrap · (largest logit) to the gradient of each counted token's largest logit, scaled as the loss
    is (RWKV-LM's L2Wrap); it does not show in the value.
    parts (k, n) bool, if given, marks the counted targets of each of k parts: the loss, which alone has a gradient, is
    then followed by each part's share in it: (1 + k,).
    """
    targets = targets.reshape(-1)[counted]
    weights = None if weights is None else weights.reshape(-1)[counted]
    count, after = divisors(hidden, count)
    each = weights is not None or parts is not None

    def rule(logits: Tensor, part: slice, gradient: bool) -> tuple[Tensor, Tensor | None]:
        loss, grad = cross_entropy_(logits, targets[part], 1 / count, l2wrap, gradient=gradient, each=each)
        if weights is not None:
            loss = loss * weights[part]
            grad = grad if grad is None else grad.mul_(weights[part, None])
        total = loss.sum() / count if weights is not None else loss.sum() * (1 / count) if each else loss
        of_parts = [] if parts is None else [(loss * parts[:, part]).sum(1) / count]
        return torch.cat([total[None], *of_parts]), grad

    sums = 1 if parts is None else 1 + len(parts)
    losses = ChunkedHead.apply(hidden, weight, counted, chunk_rows(weight.shape[0], weight.is_cuda), sums, rule) / after
    return losses[0] if parts is None else losses


def divisors(hidden: Tensor, count: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Split the division by `count` -> (the divisor before a head's gradient is formed, the one after). In float16 all
    of it comes after, with the loss scale, because numbers as small as 1 / count would vanish before."""
    return (1.0, count) if hidden.dtype == torch.float16 else (count, 1.0)


class TokenLosses(torch.autograd.Function):
    """hidden (B, T, C), weight (V, C), targets (B, T), counted (n,) -> losses (n,). If the weight trains, backward
    computes the logits again, because the factor of each loss is not there before."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        rows, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        losses, gradients = [rows.new_zeros(0, dtype=torch.float32)], [rows[:0]]
        for chunk in counted.split(chunk_rows(weight.shape[0], weight.is_cuda)):
            found, grad = cross_entropy_(
                linear(rows[chunk], weight), targets[chunk], 1.0, gradient=needs_hidden, each=True
            )
            losses.append(found)
            if grad is not None:
                gradients.append(matmul(grad, weight))
        kept = (hidden, weight, targets) if needs_weight else ()
        ctx.save_for_backward(counted, torch.cat(gradients), *kept)
        ctx.shape = hidden.shape
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        counted, gradients, *kept = ctx.saved_tensors
        grad_hidden = gradients.new_zeros(ctx.shape).view(-1, ctx.shape[-1])
        grad_hidden[counted] = gradients * grad_output[:, None].to(gradients.dtype)
        grad_weight = None
        if kept:
            hidden, weight, targets = kept
            grad_weight = weight_gradient(hidden, weight, targets, counted, grad_output)
        return grad_hidden.view(ctx.shape), grad_weight, None, None


def weight_gradient(hidden: Tensor, weight: Tensor, targets: Tensor, counted: Tensor, factors: Tensor) -> Tensor:
    """The gradient of the sum of factors (n,) times the counted tokens' losses in the weight of the head: (V, C)."""
    rows, size = hidden.reshape(-1, hidden.shape[-1]), chunk_rows(weight.shape[0], weight.is_cuda)
    total = torch.zeros_like(weight, dtype=factors.dtype)
    for chunk, factor in zip(counted.split(size), factors.split(size)):
        inputs = rows[chunk]
        _, grad = cross_entropy_(linear(inputs, weight), targets[chunk], 1.0, gradient=True, each=True)
        assert grad is not None  # because it was asked for
        total += matmul(grad.t(), inputs * factor[:, None].to(inputs.dtype)).to(total.dtype)
    return total.to(weight.dtype)


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Each counted token's cross-entropy (n,), float32 or float64; arguments as in linear_cross_entropy."""
    return TokenLosses.apply(hidden, weight, targets, counted)
