"""Modules that accelerate dispatched, whose tensors are on the CPU or on disk between uses.

accelerate wraps the forward of each module that owns tensors: it brings them in before, and away after.
BoneLinear reads its base layer's weight and never calls that forward, so it runs the same hooks itself.
Autograd keeps a weight that was used until the backward pass, as it does for any linear layer.
"""


def device_of(layer):
    """Where a layer computes: on its hook's device where it has one, else where its weight is."""
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return layer.weight.device if device is None else device


def offloaded(layer):
    """Whether a layer's weight is away between uses."""
    return getattr(getattr(layer, "_hf_hook", None), "offload", False)


def onload(modules, x):
    """Bring the modules' tensors in; -> x on the device where they are."""
    for module in modules:
        if hasattr(module, "_hf_hook"):
            (x,), _ = module._hf_hook.pre_forward(module, x)
    return x


def offload(modules, y):
    """Take away what onload brought in; -> y on the device where it is due."""
    for module in reversed(modules):
        if hasattr(module, "_hf_hook"):
            y = module._hf_hook.post_forward(module, y)
    return y
