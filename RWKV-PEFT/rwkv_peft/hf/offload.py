"""Modules that accelerate dispatched, whose tensors are on the CPU or on disk between uses.

accelerate wraps the forward of each module that owns tensors: it brings them in before, and away after.
BoneLinear reads its base layer's weight and never calls that forward, so it runs the same hooks itself.
Autograd keeps a weight that was used until the backward pass, as it does for any linear layer.
"""

from collections.abc import Sequence

import torch
from torch import nn


def device_of(layer: nn.Linear) -> torch.device:
    """Where a layer computes: on its hook's device where it has one, else where its weight is."""
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return layer.weight.device if device is None else device


def offloaded(layer: nn.Linear) -> bool:
    """Whether a layer's weight is away between uses."""
    return getattr(getattr(layer, "_hf_hook", None), "offload", False)


def onload(modules: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Bring the modules' tensors in; -> x on the device where they are."""
    for module in modules:
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            (x,), _ = hook.pre_forward(module, x)
    return x


def offload(modules: Sequence[nn.Module], y: torch.Tensor) -> torch.Tensor:
    """Take away what onload brought in; -> y on the device where it is due."""
    for module in reversed(modules):
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            y = hook.post_forward(module, y)
    return y
