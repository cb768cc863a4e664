"""The mix operations on the CPU: builds cuda/mix_cpu.cpp on first use; autograd Functions over its C interface.

Tensors are contiguous and share one dtype, float32 or bfloat16; mix.py sees to that.
"""

import ctypes
import functools

import torch
from torch.autograd import Function

from . import cpu
from .build import BuildError, Unit, build_library, source_directory


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
    level = cpu.best_level()
    command = (cpu.find_compiler(), *cpu.COMMON_FLAGS, *cpu.level_flags()[level])
    sources = source_directory()
    headers = [sources / name for name in ("mix_lerp.h", "mix_rows.h", "bfloat16.h")]
    path = build_library(
        f"mix_cpu_{level}", [Unit(sources / "mix_cpu.cpp", command)], (command[0], "-shared", "-fopenmp"), headers
    )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}; delete that file so that it is built anew") from error
    pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    kind = [flag, flag]  # bfloat16, threads
    lerp_sizes = [flag, size, size, size, size, pointer, *kind]
    norm_sizes = [size, size, size, ctypes.c_float, *kind]
    for name, arguments in (
        ("lerp_forward", [pointer] * 6 + lerp_sizes),
        ("lerp_backward", [pointer] * 11 + lerp_sizes),
        ("norm_gate_forward", [pointer] * 5 + norm_sizes),
        ("norm_gate_backward", [pointer] * 9 + norm_sizes),
        ("sigmoid_gate_forward", [pointer] * 3 + [size, *kind]),
        ("sigmoid_gate_backward", [pointer] * 5 + [size, *kind]),
        ("cross_entropy", [pointer] * 3 + [size, size, ctypes.c_float, ctypes.c_float, flag, *kind]),
        ("relu_square_forward", [pointer] * 2 + [size, *kind]),
        ("relu_square_backward", [pointer] * 3 + [size, *kind]),
    ):
        function = getattr(library, f"mix_{name}")
        function.argtypes, function.restype = arguments, None
    return library


def takes(first, *others):
    """Whether tensors are what the kernels take: real, on the CPU, of one dtype. Elsewhere the plain form serves."""
    return (
        first.device.type == "cpu"
        and first.dtype in (torch.float32, torch.bfloat16)
        and all([x is None or x.dtype == first.dtype for x in others])
        and first.numel() > 0
        and not torch.compiler.is_compiling()
        and type(first) is torch.Tensor  # not a fake one
        and available()
    )


def _kind(x):
    return x.dtype == torch.bfloat16, torch.get_num_threads()


def _pointer(x):
    return None if x is None else x.data_ptr()


def _pointers(tensors):
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
        _library().mix_lerp_forward(
            *map(_pointer, (x, last, maa, low, up)), _pointers(outs), *_lerp_sizes(x, maa, up, cu_seqlens)
        )
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
        _library().mix_lerp_backward(
            *map(_pointer, (x, last, maa, low, up)),
            _pointers(grads),
            *map(_pointer, (gx, glast, gmaa, glow, gup)),
            *_lerp_sizes(x, maa, up, cu_seqlens),
        )
        gmaa, gup = (None if grad is None else grad.to(x.dtype) for grad in (gmaa, gup))
        return gx, glast, gmaa, glow, gup, None


def _lerp_sizes(x, maa, up, cu_seqlens):
    B, T, C = x.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return maa.shape[0], B * T, C, 0 if up is None else up.shape[1], sequences, _pointer(cu_seqlens), *_kind(x)


class NormGate(Function):
    """y (B, T, H, N), g (B, T, H N), weight and bias (H N,), eps -> (B, T, H N)."""

    @staticmethod
    def forward(ctx, y, g, weight, bias, eps):
        ctx.save_for_backward(y, g, weight, bias)
        ctx.eps = eps
        out = torch.empty_like(g)
        _library().mix_norm_gate_forward(*map(_pointer, (y, g, weight, bias, out)), *_norm_sizes(y, eps))
        return out

    @staticmethod
    @_differentiable_once
    def backward(ctx, grad):
        y, g, weight, bias = ctx.saved_tensors
        gy, gg = torch.empty_like(y), torch.empty_like(g)
        train = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        sums = [torch.empty_like(weight, dtype=torch.float32) if train else None for _ in range(2)]
        _library().mix_norm_gate_backward(
            *map(_pointer, (y, g, weight, bias, grad, gy, gg, *sums)), *_norm_sizes(y, ctx.eps)
        )
        return gy, gg, *(None if x is None else x.to(weight.dtype) for x in sums), None


def _norm_sizes(y, eps):
    B, T, H, N = y.shape
    return B * T, H, N, eps, *_kind(y)


class SigmoidGate(Function):
    """r, v of one shape -> sigmoid(r) v."""

    @staticmethod
    def forward(ctx, r, v):
        ctx.save_for_backward(r, v)
        out = torch.empty_like(v)
        _library().mix_sigmoid_gate_forward(*map(_pointer, (r, v, out)), v.numel(), *_kind(v))
        return out

    @staticmethod
    @_differentiable_once
    def backward(ctx, grad):
        r, v = ctx.saved_tensors
        gr, gv = torch.empty_like(r), torch.empty_like(v)
        _library().mix_sigmoid_gate_backward(*map(_pointer, (r, v, grad, gr, gv)), v.numel(), *_kind(v))
        return gr, gv


class ReluSquare(Function):
    """x -> max(x, 0)²."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        _library().mix_relu_square_forward(*map(_pointer, (x, out)), x.numel(), *_kind(x))
        return out

    @staticmethod
    @_differentiable_once
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        gx = torch.empty_like(x)
        _library().mix_relu_square_backward(*map(_pointer, (x, grad, gx)), x.numel(), *_kind(x))
        return gx


def cross_entropy_(logits, targets, scale, pull, gradient):
    """logits (n, V), which become scale times their gradient where `gradient`; targets (n,) int64 -> losses (n,)
    float32."""
    losses = torch.empty(logits.shape[0])
    _library().mix_cross_entropy(
        *map(_pointer, (logits, targets, losses)), *logits.shape, scale, pull, gradient, *_kind(logits)
    )
    return losses
