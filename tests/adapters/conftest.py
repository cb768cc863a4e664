"""Factories of adapted layers for the adapter tests."""

import pytest
import torch
from torch import nn

from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.methods import METHODS, word_of, words_of
from rwkv_peft.config import AdapterConfig


def adapter_config(variant, **settings):
    """An AdapterConfig for a name in METHODS that targets `layer`; alpha is 8 if the method has one."""
    method = METHODS[variant]
    alpha = {"alpha": 8.0} if word_of(method).takes("alpha") else {}
    settings = {"rank": 4, "mini_rank": 4, "targets": ("layer",)} | alpha | settings
    return AdapterConfig(**words_of(method), **settings)


def adapt(layer, variant, train=True, **settings):
    """The adapter layer that replaces a linear one; with train, its parameters are random and not zero."""
    model = nn.ModuleDict({"layer": layer})
    inject(model, adapter_config(variant, **settings), gradients={"layer": torch.randn(layer.weight.shape)})
    adapted = model["layer"]
    if train:
        with torch.no_grad():
            for name in adapted.method.parameters:
                parameter = getattr(adapted, name)
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return adapted


@pytest.fixture(name="adapt")
def adapt_fixture():
    torch.manual_seed(0)
    return adapt


@pytest.fixture(name="adapter_config")
def adapter_config_fixture():
    return adapter_config
