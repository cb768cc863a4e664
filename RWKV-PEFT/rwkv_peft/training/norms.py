"""The norm of the gradients that a ZeRO optimizer holds.

DeepSpeed writes each gradient out in float64 for it, which on a CPU costs more time than the optimizer's step. Here
sums of squares in float32 stay short, and only what they come to is added up in float64.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed

SHORT = 4096  # numbers that are added up in float32
NOT_FINITE = -1.0  # what DeepSpeed takes for a norm that is infinite or no number


def square_sum(x: Tensor) -> Tensor:
    """The sum of the squares of x (any shape, bfloat16 or float32), to float32's rounding -> float64 (). Infinite where
    SHORT of them exceed float32's range, whose root is 1.8e19."""
    flat = x.detach().reshape(-1)
    whole = flat.numel() // SHORT * SHORT
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, SHORT), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)
    return norms.double().square().sum() + rest.double().square()


def gradient_norm(optimizer: Any, gradients: Iterable[Tensor]) -> Tensor:
    """The norm of what the ranks' parts of a DeepSpeedZeroOptimizer hold of some gradients, this rank's given
    -> float32 (), NOT_FINITE where it is not finite. Parts are padded with zeros."""
    total = torch.zeros((), dtype=torch.float64, device=optimizer.device)
    for gradient in gradients:
        total += square_sum(gradient)
    distributed.all_reduce(total, group=optimizer.dp_process_group)
    norm = total.sqrt().float()
    return torch.where(norm.isfinite(), norm, torch.full_like(norm, NOT_FINITE))
