"""The mix operations on the CPU: builds cpu/mix on first use; autograd Functions over its C interface.

Tensors are contiguous and share one dtype, float32 or bfloat16; op.py sees to that.
"""

import ctypes
import functools

import torch
from torch.autograd import Function

from ..native import levels
from ..native.arguments import fields, fill
from ..native.cpu import cpu_library
from ..native.errors import BuildError


class LerpArguments(ctypes.Structure):
    """cpu/mix/arguments.h's structure of the same name, as are the others."""

    _fields_ = fields(
        "x last maa low up outs grads gx glast gmaa glow gup cu_seqlens", "n tokens channels rank sequences"
    )


class NormGateArguments(ctypes.Structure):
    _fields_ = fields("y g weight bias out grad gy gg gweight gbias", "tokens heads size", "eps")


class SigmoidGateArguments(ctypes.Structure):
    _fields_ = fields("r v out grad gr gv", "count")


class ReluSquareArguments(ctypes.Structure):
    _fields_ = fields("x out grad gx", "count")


FUNCTIONS = tuple(
    (f"mix_{name}_{direction}", None, structure)
    for name, structure in (
        ("lerp", LerpArguments),
        ("norm_gate", NormGateArguments),
        ("sigmoid_gate", SigmoidGateArguments),
        ("relu_square", ReluSquareArguments),
    )
    for direction in ("forward", "backward")
)


@functools.cache
def available():
    """Whether the kernels can be built and loaded here."""
    try:
        _library()
    except BuildError:
        return False
    return True


@functools.cache
def _library():
    level = levels.best_level()
    return cpu_library(f"mix_cpu_{level}", "mix/mix.cpp", levels.level_flags()[level], FUNCTIONS)


def _table(tensors):
    """A table of tensors' addresses."""
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


class _NoGradient:
    """Stands for an autograd context where nothing will be differentiated."""

    def save_for_backward(self, *tensors):
        """Nothing is saved."""


def run(function, *arguments):
    """function.apply(*arguments), past autograd where gradients are off: on one token its bookkeeping costs several
    times the kernel."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NoGradient(), *arguments)


def _differentiable_once(backward):
    """A backward that refuses create_graph=True, which would take its result for a constant."""

    @functools.wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the CPU's mix kernels have no second derivative; differentiate twice in float64, which "
                "takes the plain form"
            )
        return backward(ctx, *(grad.contiguous() for grad in grads))

    return checked


class Lerp(Function):
    """x (B, T, C), last (n, C) or None, maa (m, C), low (B, T, m K) and up (m, K, C) or None, cu_seqlens int64 or None
    -> m times (B, T, C)."""

    @staticmethod
    def forward(ctx, x, last, maa, low, up, cu_seqlens):
        ctx.save_for_backward(x, last, maa, low, up, cu_seqlens)
        outs = tuple(torch.empty_like(x) for _ in range(maa.shape[0]))
        tensors = dict(x=x, last=last, maa=maa, low=low, up=up, cu_seqlens=cu_seqlens)
        table = _table(outs)
        _library().mix_lerp_forward(_lerp(tensors, outs=ctypes.addressof(table)))
        return outs

    @staticmethod
    @_differentiable_once
    def backward(ctx, *grads):
        x, last, maa, low, up, cu_seqlens = ctx.saved_tensors
        need_x, need_last, need_maa, need_low, need_up = ctx.needs_input_grad[:5]
        gx = torch.empty_like(x) if need_x else None
        glast = torch.zeros_like(last) if need_last else None
        gmaa = torch.empty_like(maa, dtype=torch.float32) if need_maa else None
        glow = torch.empty_like(low) if need_low else None
        gup = torch.empty_like(up, dtype=torch.float32) if need_up else None
        tensors = dict(x=x, last=last, maa=maa, low=low, up=up, cu_seqlens=cu_seqlens)
        tensors |= dict(gx=gx, glast=glast, gmaa=gmaa, glow=glow, gup=gup)
        table = _table(grads)
        _library().mix_lerp_backward(_lerp(tensors, grads=ctypes.addressof(table)))
        gmaa, gup = (None if grad is None else grad.to(x.dtype) for grad in (gmaa, gup))
        return gx, glast, gmaa, glow, gup, None


def _lerp(tensors, **tables):
    x, up, cu_seqlens = tensors["x"], tensors["up"], tensors["cu_seqlens"]
    B, T, C = x.shape
    return fill(
        LerpArguments,
        x,
        tensors,
        n=tensors["maa"].shape[0],
        tokens=B * T,
        channels=C,
        rank=0 if up is None else up.shape[1],
        sequences=B if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        **tables,
    )


class NormGate(Function):
    """y (B, T, H, N), g (B, T, H N), weight and bias (H N,), eps -> (B, T, H N)."""

    @staticmethod
    def forward(ctx, y, g, weight, bias, eps):
        ctx.save_for_backward(y, g, weight, bias)
        ctx.eps = eps
        out = torch.empty_like(g)
        _library().mix_norm_gate_forward(_norm_gate(dict(y=y, g=g, weight=weight, bias=bias, out=out), eps))
        return out

    @staticmethod
    @_differentiable_once
    def backward(ctx, grad):
        y, g, weight, bias = ctx.saved_tensors
        gy, gg = torch.empty_like(y), torch.empty_like(g)
        train = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        sums = [torch.empty_like(weight, dtype=torch.float32) if train else None for _ in range(2)]
        tensors = dict(y=y, g=g, weight=weight, bias=bias, grad=grad, gy=gy, gg=gg, gweight=sums[0], gbias=sums[1])
        _library().mix_norm_gate_backward(_norm_gate(tensors, ctx.eps))
        return gy, gg, *(None if x is None else x.to(weight.dtype) for x in sums), None


def _norm_gate(tensors, eps):
    B, T, H, N = tensors["y"].shape
    return fill(NormGateArguments, tensors["y"], tensors, tokens=B * T, heads=H, size=N, eps=eps)


class SigmoidGate(Function):
    """r, v of one shape -> sigmoid(r) v."""

    @staticmethod
    def forward(ctx, r, v):
        ctx.save_for_backward(r, v)
        out = torch.empty_like(v)
        _library().mix_sigmoid_gate_forward(fill(SigmoidGateArguments, v, dict(r=r, v=v, out=out), count=v.numel()))
        return out

    @staticmethod
    @_differentiable_once
    def backward(ctx, grad):
        r, v = ctx.saved_tensors
        gr, gv = torch.empty_like(r), torch.empty_like(v)
        tensors = dict(r=r, v=v, grad=grad, gr=gr, gv=gv)
        _library().mix_sigmoid_gate_backward(fill(SigmoidGateArguments, v, tensors, count=v.numel()))
        return gr, gv


class ReluSquare(Function):
    """x -> max(x, 0)²."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        _library().mix_relu_square_forward(fill(ReluSquareArguments, x, dict(x=x, out=out), count=x.numel()))
        return out

    @staticmethod
    @_differentiable_once
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        gx = torch.empty_like(x)
        arguments = fill(ReluSquareArguments, x, dict(x=x, grad=grad, gx=gx), count=x.numel())
        _library().mix_relu_square_backward(arguments)
        return gx
