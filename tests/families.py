"""The generations that compute in ways of their own, on which the laws of steps, objectives and files hold. RWKV-7a is
an RWKV-7 but for its feed-forward: its own tests, and those of every generation in tests/models, have it. And small
random models of any generation."""

import torch

from rwkv_peft.models import FAMILIES

DISTINCT = FAMILIES[:2]


def shaken(family, amount=0.1, grad_checkpoint=False, seed=0, **sizes):
    """A small model without zeros in its tensors."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_embd": 16, "vocab_size": 30, "head_size": 8} | sizes
    model = family.build(family.new_dimensions(**sizes), grad_checkpoint)
    family.init_weights(model)
    return shake(model, amount)


@torch.no_grad()
def shake(model, amount=0.1):
    """Add random numbers to the parameters that train, as training would -> the model."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * amount)
    return model
