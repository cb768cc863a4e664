"""How far the first step of Adam moves a weight, by method: the formulas of docs/learning_rates.md."""

import math

import pytest
import torch
from torch import nn

from adapters.layers import merged_weight

OUT, IN, RANK, RATE = 120, 96, 8, 1e-4


def lora(scale=1.0):
    return lambda weight: scale * math.sqrt(RANK / (3 * IN))


def block_affine(weight):
    return math.sqrt(1 + RANK * weight.square().mean())


def pissa(weight):
    largest = torch.linalg.svdvals(weight)[:RANK]
    return math.sqrt(largest.sum() * (1 / IN + 1 / OUT))


# the root mean square of a weight's change over the learning rate
FORMULAS = {
    "bone": lambda weight: 1.0,
    "bone-mini": lambda weight: 1.0,
    "bat-in": block_affine,
    "bat-out": block_affine,
    "lora": lora(),
    "rslora": lora(2.0 / math.sqrt(RANK)),
    "pissa": pissa,
}


@pytest.mark.parametrize("variant", FORMULAS)
@pytest.mark.parametrize("size", [0.05, 0.4])
def test_the_first_step_moves_a_weight_as_far_as_the_formula_says(variant, size, adapt):
    layer = nn.Linear(IN, OUT, bias=False)
    layer.weight.data.normal_(std=size)
    weight = layer.weight.detach().clone()
    alpha = 2.0 if variant == "rslora" else 0.0
    adapted = adapt(layer, variant, train=False, rank=RANK, mini_rank=60, alpha=alpha, svd_niter=0)
    before = merged_weight(adapted)
    optimizer = torch.optim.AdamW(
        [getattr(adapted, name) for name in adapted.method.parameters], lr=RATE, weight_decay=0
    )
    x = torch.randn(256, IN)
    (adapted(x) * torch.randn(256, OUT)).sum().backward()
    optimizer.step()
    change = (merged_weight(adapted) - before).square().mean().sqrt() / RATE
    assert change.item() == pytest.approx(float(FORMULAS[variant](weight)), rel=0.15)
