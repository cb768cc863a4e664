"""Optimizer groups: which parameters have weight decay, and which learn faster."""

import pytest
import torch
from torch import nn

from rwkv_peft.adapters.groups import parameter_groups
from rwkv_peft.models import family_named


@pytest.fixture
def model():
    model = nn.Module()
    square, vector = (8, 8), (1, 1, 8)
    shapes = dict(time_decay=vector, time_decay_w1=(8, 4), time_maa_k=vector, time_faaaa=(2, 4), weight=square)
    shapes |= dict(bias=(8,), bone=(2, 4, 4), lora_A=(4, 8), lora_B=(8, 4), frozen=square)
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=name != "frozen"))
    return model


def rates(model, **settings):
    """name -> (lr_scale, weight_decay) over all groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, **settings)
    pairs = [(names[id(p)], (g["lr_scale"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def test_matrices_decay_and_vectors_do_not(model):
    found = rates(model, weight_decay=0.1)
    assert "frozen" not in found
    decaying = {name for name, (_, decay) in found.items() if decay}
    assert decaying == {"weight", "bone", "lora_A", "lora_B", "time_decay_w1", "time_faaaa"}


def test_layerwise_rates_follow_rwkv_lm(model):
    found = rates(model, weight_decay=0.1, family=family_named("x060"))
    assert found["time_decay"] == (2.0, 0.0)
    for name in ("time_decay_w1", "time_maa_k", "time_faaaa", "bias"):
        assert found[name] == (1.0, 0.0)
    assert found["weight"] == (1.0, 0.1)


def test_lora_plus_speeds_up_lora_B_alone(model):
    found = rates(model, ratios=(("lora_B", 16.0),))
    assert {name for name, (scale, _) in found.items() if scale != 1} == {"lora_B"}
    assert found["lora_B"] == (16.0, 0.0)


def test_an_optimizer_takes_the_groups(model):
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1, family=family_named("x060")), lr=1e-3)
    assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0, 2.0}
