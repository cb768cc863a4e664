"""cpu/mix as Python sees it: built on first use, its structures, and what its autograd Functions share."""

import ctypes
import functools

import torch

from ..native import levels
from ..native.arguments import fields
from ..native.cpu import cpu_library
from ..native.errors import BuildError


class LerpArguments(ctypes.Structure):
    """cpu/mix/arguments.h's structure of the same name, as are the others."""

    _fields_ = fields(
        "x last maa low up outs grads gx glast gmaa glow gup cu_seqlens", "n tokens channels rank sequences"
    )


class ReluSquareArguments(ctypes.Structure):
    _fields_ = fields("x out grad gx", "count")


class NormGateArguments(ctypes.Structure):
    _fields_ = fields("y g weight bias out grad gy gg gweight gbias", "tokens heads size", "eps")


class SigmoidGateArguments(ctypes.Structure):
    _fields_ = fields("r v out grad gr gv", "count")


class DeltaKeysArguments(ctypes.Structure):
    _fields_ = fields("k low a0 k_k k_a key a b gkey ga gb gk glow ga0 gk_k gk_a", "tokens heads size")


class ValueResidualArguments(ctypes.Structure):
    _fields_ = fields("v first low v0 out grad gv gfirst glow gv0", "tokens channels")


class NormBonusGateArguments(ctypes.Structure):
    _fields_ = fields(
        "y r k v g r_k weight bias out grad gy gr gk gv gg gr_k gweight gbias", "tokens heads size", "eps"
    )


FUNCTIONS = tuple(
    (f"mix_{name}_{direction}", None, structure)
    for name, structure in (
        ("lerp", LerpArguments),
        ("relu_square", ReluSquareArguments),
        ("norm_gate", NormGateArguments),
        ("sigmoid_gate", SigmoidGateArguments),
        ("delta_keys", DeltaKeysArguments),
        ("value_residual", ValueResidualArguments),
        ("norm_bonus_gate", NormBonusGateArguments),
    )
    for direction in ("forward", "backward")
)


@functools.cache
def available():
    """Whether the kernels can be built and loaded here."""
    try:
        library()
    except BuildError:
        return False
    return True


@functools.cache
def library():
    """The loaded library, of this processor's best instruction set; BuildError where it cannot be built or loaded."""
    level = levels.best_level()
    return cpu_library(f"mix_cpu_{level}", "mix/mix.cpp", levels.level_flags()[level], FUNCTIONS)


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


def differentiable_once(backward):
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


def sums_like(parameters, wanted):
    """Room for the gradients of parameters, sums over tokens: float32; None each where not wanted."""
    return [torch.empty_like(parameter, dtype=torch.float32) if wanted else None for parameter in parameters]


def rounded(sums, dtype):
    """Those gradients in the parameters' dtype."""
    return [None if x is None else x.to(dtype) for x in sums]
