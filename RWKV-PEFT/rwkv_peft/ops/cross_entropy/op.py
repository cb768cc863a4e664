"""Cross-entropy of given logits together with its gradient, which overwrites the logits: plain torch for any device and
dtype, kernels for float32 and bfloat16 if they can be built."""

from types import ModuleType

import torch
from torch import Tensor

from . import cpu, cuda


def cross_entropy_(
    logits: Tensor, targets: Tensor, scale: float | Tensor, pull: float = 0.0, gradient: bool = True, each: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The losses of some tokens, scaled and added up, and the gradient of that sum.

    logits (n, V), which are overwritten; targets (n,) int64; scale: a number or a 0-dim tensor; pull adds
    pull · (largest logit) to the unscaled gradient of each row's largest logit. -> (scale · Σ losses, in float32, or in
    float64 for float64 logits, or with `each` the losses (n,) themselves; the gradient (n, V) in the logits' dtype, or
    None without `gradient`).
    """
    kernels = backend(logits)
    if kernels is not None:
        losses = kernels.losses_(logits, targets.contiguous(), float(scale), pull, gradient)
        return losses if each else losses.sum() * scale, logits if gradient else None
    dtype = logits.dtype
    logits = logits.to(torch.float64 if dtype == torch.float64 else torch.float32)
    picked = targets[:, None]
    largest, where = logits.max(dim=1, keepdim=True)
    logits.sub_(largest)
    true_logit = logits.gather(1, picked)
    log_sum = logits.exp().sum(dim=1, keepdim=True).log()
    losses = (log_sum - true_logit)[:, 0]
    found = losses if each else losses.sum() * scale
    if not gradient:
        return found, None
    grad = logits.sub_(log_sum).exp_()  # the softmax, in the logits' own memory
    grad.scatter_add_(1, picked, torch.full_like(largest, -1.0))
    grad.scatter_add_(1, where, largest * pull)
    return found, grad.mul_(scale).to(dtype)


def backend(logits: Tensor) -> ModuleType | None:
    """The module (cpu or cuda) with a kernel for the logits, or None for plain torch: the one place that decides."""
    kernels = cpu if logits.is_cpu else cuda
    return kernels if logits.is_contiguous() and kernels.takes(logits) else None
