"""Helpers of the tests of Bone on Hugging Face models."""

import torch

from rwkv_peft.hf import BoneConfig, BoneLinear

FORMS = (True, "bat-in", "bat-out", "mini")


def fill(model, std=0.02, seed=0):
    """Give every Bone block random values, so that an adapter has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "bone_block" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def layer_of(form, base, **settings):
    """A BoneLinear of a form on a linear layer."""
    return BoneLinear(
        base, "default", BoneConfig(r=4, init_weights=form, mini_r=2 if form == "mini" else 0, **settings)
    )
