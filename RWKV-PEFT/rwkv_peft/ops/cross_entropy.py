"""Cross-entropy of given logits together with its gradient, which takes the logits' place; on the CPU by
cpu/cross_entropy, built on first use."""

import ctypes
import functools

import torch

from .native import levels
from .native.arguments import fields, fill, takes
from .native.cpu import cpu_library
from .native.errors import BuildError


class CrossEntropyArguments(ctypes.Structure):
    """cpu/cross_entropy/arguments.h's structure of the same name."""

    _fields_ = fields("logits targets losses", "rows vocabulary", "scale pull", "gradient bfloat16 threads")


def cross_entropy_(logits, targets, scale, pull=0.0, gradient=True):
    """The losses of some tokens, scaled and added up, and the gradient of that sum.

    logits (n, V), of which nothing is left afterwards; targets (n,) int64; scale a number. pull adds pull · (largest
    logit) to the unscaled gradient of each row's largest logit. -> (scale · Σ losses, a scalar of float32, or float64
    for float64 logits; the gradient (n, V) in logits' dtype, or None where not `gradient`).
    """
    if takes(logits) and logits.is_contiguous() and available():
        check_range(targets, logits.shape[1])
        losses = _by_kernel(logits, targets.contiguous(), float(scale), pull, gradient)
        return losses.sum() * scale, logits if gradient else None
    dtype = logits.dtype
    logits = logits.to(torch.float64 if dtype == torch.float64 else torch.float32)
    picked = targets[:, None]
    largest, where = logits.max(dim=1, keepdim=True)
    logits.sub_(largest)
    true_logit = logits.gather(1, picked)
    log_sum = logits.exp().sum(dim=1, keepdim=True).log()
    loss = (log_sum - true_logit).sum() * scale
    if not gradient:
        return loss, None
    grad = logits.sub_(log_sum).exp_()  # the softmax, in the logits' own memory
    grad.scatter_add_(1, picked, torch.full_like(largest, -1.0))
    grad.scatter_add_(1, where, largest * pull)
    return loss, grad.mul_(scale).to(dtype)


def check_range(targets, vocabulary):
    """The kernel reads logits at these positions."""
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise IndexError(
            f"targets from {int(targets.min())} to {int(targets.max())} for {vocabulary} logits; a target is a "
            "token of the model's vocabulary: check the tokenizer that made the data"
        )


def _by_kernel(logits, targets, scale, pull, gradient):
    """logits (n, V), which become scale times their gradient where `gradient`; targets (n,) int64 -> losses (n,)
    float32."""
    losses = torch.empty(logits.shape[0])
    tensors = dict(logits=logits, targets=targets, losses=losses)
    numbers = dict(zip(("rows", "vocabulary"), logits.shape), scale=scale, pull=pull, gradient=gradient)
    _library().cross_entropy(fill(CrossEntropyArguments, logits, tensors, **numbers))
    return losses


@functools.cache
def available():
    """Whether the kernel can be built and loaded here."""
    try:
        _library()
    except BuildError:
        return False
    return True


@functools.cache
def _library():
    level = levels.best_level()
    functions = (("cross_entropy", None, CrossEntropyArguments),)
    return cpu_library(
        f"cross_entropy_cpu_{level}", "cross_entropy/cross_entropy.cpp", levels.level_flags()[level], functions
    )
