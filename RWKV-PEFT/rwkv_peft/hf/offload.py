"""Modules that accelerate dispatched: their tensors are on the CPU or on disk between uses.

accelerate wraps the forward of each module that owns tensors, to load them before it and offload them after it.
BoneLinear reads its base layer's weight without that forward, so it runs the same hooks itself.
Autograd keeps a weight that was used until the backward pass, as it does for any linear layer.
"""

from collections.abc import Sequence

import torch
from torch import nn


def device_of(layer: nn.Linear) -> torch.device:
    """The device on which a layer computes: its hook's if it has one, else its weight's."""
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return layer.weight.device if device is None else device


def offloaded(layer: nn.Linear) -> bool:
    """Return whether a layer's weight is offloaded between uses."""
    return getattr(getattr(layer, "_hf_hook", None), "offload", False)


def onload(modules: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Load the modules' tensors; -> x on their device."""
    for module in modules:
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            (x,), _ = hook.pre_forward(module, x)
    return x


def offload(modules: Sequence[nn.Module], y: torch.Tensor) -> torch.Tensor:
    """Offload the tensors that onload loaded; -> y on the device that the hooks give it."""
    for module in reversed(modules):
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            y = hook.post_forward(module, y)
    return y
