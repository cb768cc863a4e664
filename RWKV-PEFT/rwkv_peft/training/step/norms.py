"""Compute the norm of the gradients that a ZeRO optimizer holds.

DeepSpeed converts each gradient to float64 for this, which on a CPU takes longer than the optimizer's step. Here
float32 adds up the squares of only SHORT numbers at a time, and float64 adds up these sums.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed

SHORT = 4096  # numbers whose squares are added up in float32
NOT_FINITE = -1.0  # DeepSpeed's value for a norm that is infinite or NaN


def square_sum(x: Tensor) -> Tensor:
    """Sum the squares of x (any shape, bfloat16 or float32), to float32's rounding -> float64 (). It is infinite if the
    squares of SHORT numbers exceed float32's range, that is if their root exceeds 1.8e19."""
    flat = x.detach().reshape(-1)
    whole = flat.numel() // SHORT * SHORT
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, SHORT), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)
    return norms.double().square().sum() + rest.double().square()


def gradient_norm(optimizer: Any, gradients: Iterable[Tensor]) -> Tensor:
    """The norm of gradients whose parts the ranks of a DeepSpeedZeroOptimizer hold, from this rank's parts -> float32
    (), NOT_FINITE if it is not finite. Parts are padded with zeros, which add nothing."""
    total = torch.zeros((), dtype=torch.float64, device=optimizer.device)
    for gradient in gradients:
        total += square_sum(gradient)
    distributed.all_reduce(total, group=optimizer.dp_process_group)
    norm = total.sqrt().float()
    return torch.where(norm.isfinite(), norm, torch.full_like(norm, NOT_FINITE))
