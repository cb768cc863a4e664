"""A model whose products add its residuals themselves, as on a GPU, computes what it does on a CPU: logits, states and
all gradients."""

import pytest
import torch

from rwkv_peft.adapters.inject import inject
from rwkv_peft.config import AdapterConfig
from rwkv_peft.models import FAMILIES
from rwkv_peft.ops import adding


def model_of(family, method, checkpoint, mode="bone", rank=8):
    """A random model, whole or with adapters."""
    model = family.build(family.new_dimensions(2, 64, 40), checkpoint).double()
    draw_parameters(model)  # of which a method may make its constants
    inject(model, AdapterConfig(method=method, mode=mode, rank=rank), family=family)
    draw_parameters(model)
    return model


@torch.no_grad()
def draw_parameters(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def step(model, tokens, cu_seqlens):
    """Logits, what the states hold, and the gradient of every parameter that has one."""
    y, state = model(tokens, cu_seqlens=cu_seqlens)
    kept = [x for layer in state for x in layer]
    model.zero_grad()
    (y.square().sum() + sum(x.square().sum() for x in kept)).backward()
    return [y, *kept, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("checkpoint", (False, True))
@pytest.mark.parametrize("lengths", [None, (3, 1, 8)], ids=("rows", "packed"))
@pytest.mark.parametrize("method", ("none", "bone", "lora"))
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_step_is_the_same(family, method, lengths, checkpoint, monkeypatch):
    model = model_of(family, method, checkpoint)
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.arange(12).view(2, 6) if lengths is None else torch.arange(12)[None]
    expected = step(model, tokens, bounds)
    products = []
    monkeypatch.setattr(adding, "inside_product", lambda *_: products.append(1) or True)
    found = step(model, tokens, bounds)
    assert len(products) == (2 if family.version == "x070" else 1) * len(model.blocks) * (1 + checkpoint)
    for x, true in zip(found, expected, strict=True):
        torch.testing.assert_close(x, true, rtol=1e-9, atol=1e-12)
