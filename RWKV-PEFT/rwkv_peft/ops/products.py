"""Dense products of models, adapters and heads: the one place through which they go.

Many CPUs have no instructions for bfloat16 or float16, and torch multiplies these there by plain loops, up to a hundred
times as slowly as float32. Weights and activations stay in their dtype in memory there, and are converted to float32
for the time of one product, with one rounding of its result. On all other devices each function is torch's.
"""

import functools
import os
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .native.calls import constant_when_compiled

HALVES = (torch.bfloat16, torch.float16)
ELEMENTS = 1 << 22  # of a matrix that are converted at a time: 16 MiB


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., in), weight (out, in), bias (out,) or None -> (..., out)."""
    if not converts(x):
        return F.linear(x, weight, bias)
    y = _product(x.reshape(-1, x.shape[-1]), weight.t(), bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b: a (..., n) and a matrix b (n, m) -> (..., m), or batches of as many matrices."""
    if not converts(a):
        return a @ b
    return linear(a, b.t()) if b.dim() == 2 else _product(a, b)


def addmm_(total: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """total = beta total + alpha a b, of matrices or of batches of them, without gradients. total is not read if beta
    is 0."""
    if converts(a):
        return _converted_(total, a, b, beta, alpha)
    return (total.addmm_ if total.dim() == 2 else total.baddbmm_)(a, b, beta=beta, alpha=alpha)


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a b, of matrices, in one operation, without gradients."""
    if converts(a):
        return _converted_(a.new_empty(len(a), b.shape[1]), a, b, 0.0, scale)
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def einsum(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """torch.einsum, without gradients."""
    if not converts(a):
        return torch.einsum(equation, a, b)
    return torch.einsum(equation, a.float(), b.float()).to(a.dtype)


def converts(x: Tensor) -> bool:
    """True if products of x, and of others of its dtype, are computed in float32."""
    return x.is_cpu and is_slow(x.dtype)


@constant_when_compiled  # torch.compile cannot trace what asks a library
def is_slow(dtype: torch.dtype) -> bool:
    """True if this machine's CPU multiplies a dtype more slowly than converting it to float32 would.

    Decided by instructions, because a measurement can differ from one run to the next, and a run resumes bitwise.
    benchmarks/step.py measured them: AMX alone is faster than float32. AVX512-BF16 takes 1.8 times its time and
    AVX512-FP16 1.2 times, as much as converting does; without either it is 3 to 90 times.
    """
    return dtype in HALVES and not (dtype == torch.bfloat16 and _has_fast_bfloat16())


@functools.cache
def _has_fast_bfloat16() -> bool:
    if platform.machine().lower() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()  # oneDNN's own; it multiplies for torch
    return ("AMX" in allowed or allowed in ("", "ALL", "DEFAULT")) and torch.cpu._init_amx()


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias in float32: a (..., m, n), b (..., n, k), bias (k,) or None."""
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (a, b, bias))
    found: Tensor = _Product.apply(a, b, bias) if trained else _forward(a, b, bias)
    return found


class _Product(Function):
    """_product with gradients, which keeps no converted tensor."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None)
        return _forward(a, b, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        need_a, need_b, need_bias = ctx.needs_input_grad
        ga = matmul(g, b.mT) if need_a else None
        gb = matmul(a.mT, g) if need_b else None
        return ga, gb, g.sum(0) if need_bias else None


def _forward(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if _parts(a, b) == 1:
        wide = a.float() @ b.float()
        return (wide if bias is None else wide.add_(bias)).to(a.dtype)
    y = a.new_empty(a.shape[0], b.shape[1])
    if bias is None:
        return _converted_(y, a, b, 0.0, 1.0)
    return _converted_(y.copy_(bias), a, b, 1.0, 1.0)


def _converted_(total: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """addmm_ in float32. Large matrices are cut along their longest side, and converted a part at a time."""
    parts, (rows, inner), columns = _parts(a, b), a.shape[-2:], b.shape[-1]
    if parts > 1 and inner < max(rows, columns):
        if columns > rows:
            wide, pieces = a.float(), zip(total.chunk(parts, 1), b.chunk(parts, 1))
            each = ((some, wide, own) for some, own in pieces)
        else:
            wide, pieces = b.float(), zip(total.chunk(parts), a.chunk(parts))
            each = ((some, own, wide) for some, own in pieces)
        for some, left, right in each:
            _converted_(some, left, right, beta, alpha)
        return total
    wide = total.float() if beta else torch.empty_like(total, dtype=torch.float32)
    add = wide.addmm_ if a.dim() == 2 else wide.baddbmm_
    for left, right in zip(a.chunk(parts, -1), b.chunk(parts, -2)):
        add(left.float(), right.float(), beta=beta, alpha=alpha)
        beta = 1.0
    return total.copy_(wide)


def _parts(a: Tensor, b: Tensor) -> int:
    """The number of parts in which a product is computed, so that none has more than ELEMENTS; batches are small."""
    if a.dim() > 2:
        return 1
    (rows, inner), columns = a.shape, b.shape[1]
    return max(1, -(-max(rows * inner, inner * columns, rows * columns) // ELEMENTS))
