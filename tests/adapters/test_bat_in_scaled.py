"""bat-in-scaled: the constant between its terms, where it comes from, and that it stays what it is."""

import math

import pytest
import torch
from torch import nn

from adapters.layers import merged_weight
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.cli.errors import UserError

METHOD = METHODS["bat-in-scaled"]


def a_layer(std=0.1, in_features=24, out_features=16):
    layer = nn.Linear(in_features, out_features, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("std", [3e-3, 0.1, 40.0])
def test_the_terms_of_a_step_have_one_size(rank, std, adapter_config):
    weight = a_layer(std, 128, 96).weight.detach()
    scale = METHOD.held.make(weight, adapter_config("bat-in-scaled", rank=rank), None)["bone_scale"]
    assert scale.item() == pytest.approx(1 / (weight.square().mean().sqrt().item() * math.sqrt(rank)), rel=2**-8)
    step = torch.randn(128 // rank, rank, rank).sign()
    change, addend = (
        METHOD.change.delta(w, {"bone": step, "bone_scale": scale}) for w in (weight, torch.zeros_like(weight))
    )
    assert [t.square().mean().sqrt().item() for t in (change - addend, addend)] == pytest.approx([1, 1], rel=0.05)


def test_a_weight_of_zeros_has_the_scale_1(adapt):
    layer = a_layer(std=0.0)
    adapted = adapt(layer, "bat-in-scaled")
    assert adapted.bone_scale.tolist() == [1.0] and adapted.scale == 1
    x = torch.randn(5, 24)
    torch.testing.assert_close(adapted(x), x @ merged_weight(adapted).t())


def test_no_cast_of_the_model_changes_the_scale(adapt):
    layer = adapt(a_layer(), "bat-in-scaled")
    told, number = layer.bone_scale.clone(), layer.scale
    layer.bfloat16()
    assert layer.bone_scale.float().equal(told) and told.item() == layer.scale == number


def test_layers_of_different_scales_share_what_torch_compile_makes(adapt):
    torch._dynamo.reset()
    x = torch.randn(5, 24, requires_grad=True)
    for std in (0.1, 0.2, 0.3):
        layer = adapt(a_layer(std), "bat-in-scaled")
        expected = layer(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            layer.compile(backend="aot_eager", fullgraph=True)
            y = layer(x)
        torch.testing.assert_close(y, expected)
        for found, true in zip(*(torch.autograd.grad(t.square().sum(), (x, layer.bone)) for t in (y, expected))):
            torch.testing.assert_close(found, true)


@pytest.mark.parametrize("scale", [0.0, -2.0, math.inf, math.nan])
def test_a_scale_that_nothing_can_be_divided_by_is_refused(scale, adapter_config):
    initial = {"layer.bone_scale": torch.tensor([scale])}
    with pytest.raises(UserError, match=f"a bone_scale of {scale:g}, .* copy it again"):
        inject(nn.ModuleDict({"layer": a_layer()}), adapter_config("bat-in-scaled"), initial=initial)
    with pytest.raises(UserError, match="a finite number above 0"):
        METHOD.change.opposite({"bone": torch.zeros(6, 4, 4), "bone_scale": torch.tensor([scale])}, 1.0)
