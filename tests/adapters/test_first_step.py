"""The distance by which Adam's first step moves a weight, by method: the formulas of docs/guides/learning-rates.md."""

import math

import pytest
import torch
from torch import nn

from adapters.layers import merged_weight
from rwkv_peft.adapters.groups import learning_ratios
from rwkv_peft.adapters.methods import METHODS

OUT, IN, RANK, RATE = 120, 96, 8, 1e-4
TYPICAL = 1 / math.sqrt(IN)  # of the entries of a weight that keeps the size of its input


def lora(scale=1.0):
    return lambda weight: scale * math.sqrt(RANK / (3 * IN))


def block_affine(weight):
    return math.sqrt(1 + RANK * weight.square().mean())


def pissa(weight):
    largest = torch.linalg.svdvals(weight)[:RANK]
    return math.sqrt(largest.sum() * (1 / IN + 1 / OUT))


def olora(weight):
    return math.sqrt(torch.linalg.qr(weight).R[:RANK].square().sum() / IN + RANK / OUT)


def lora_ga(weight):
    return math.sqrt(RANK * math.sqrt(OUT) / 16 * (1 / IN + 1 / OUT))


def dora(weight):
    return math.sqrt(RANK / (3 * IN) + weight.square().mean())


# the root mean square of a weight's change over the learning rate
FORMULAS = {
    "bone": lambda weight: 1.0,
    "bone-mini": lambda weight: 1.0,
    "bone-signed": lambda weight: 1.0,
    "bat-in": block_affine,
    "bat-out": block_affine,
    "lora": lora(),
    "rslora": lora(2.0 / math.sqrt(RANK)),
    "lora-plus": lora(16.0),
    "pissa": pissa,
    "olora": olora,
    "lora-ga": lora_ga,
    "dora": dora,
}


def test_every_method_has_its_formula():
    assert set(FORMULAS) == set(METHODS)


@pytest.mark.parametrize("variant", FORMULAS)
@pytest.mark.parametrize("size", [0.05, TYPICAL, 0.4])
def test_the_first_step_moves_a_weight_as_far_as_the_formula_says(variant, size, adapt, adapter_config):
    layer = nn.Linear(IN, OUT, bias=False)
    layer.weight.data.normal_(std=size)
    weight = layer.weight.detach().clone()
    own = {"rslora": {"alpha": 2.0}, "pissa": {"svd_niter": 0}}.get(variant, {"alpha": 0.0})
    settings = {"rank": RANK, "mini_rank": 60} | own
    adapted = adapt(layer, variant, train=False, **settings)
    method, config, before = adapted.method, adapter_config(variant, **settings), merged_weight(adapted)
    ratios = dict(learning_ratios(method, config))
    groups = [{"params": [getattr(adapted, name)], "lr": RATE * ratios.get(name, 1.0)} for name in method.parameters]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    x = torch.randn(256, IN)
    (adapted(x) * torch.randn(256, OUT)).sum().backward()
    optimizer.step()
    change = (merged_weight(adapted) - before).square().mean().sqrt() / RATE
    assert change.item() == pytest.approx(float(FORMULAS[variant](weight)), rel=0.15)
    if size == TYPICAL:  # what the rule of rates goes by
        assert change.item() == pytest.approx(method.step(method, config, IN), rel=0.15)
