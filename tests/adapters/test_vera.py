"""VeRA against Hugging Face peft's layer; its matrices and seed."""

import hashlib
import warnings

import pytest
import torch
from torch import nn

from adapters.layers import merged_weight
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.adapters.vera import shared, size
from rwkv_peft.cli.errors import UserError

METHOD = METHODS["vera"]


def gradients(y, *inputs):
    return torch.autograd.grad(y, inputs, torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))


def test_values_and_gradients_are_those_of_pefts_layer(adapt):
    """Of one size, at which both share the same matrices; peft has no c, which goes into its B."""
    peft = pytest.importorskip("peft")
    layer = adapt(nn.Linear(24, 16).double(), "vera", d_initial=0.3, init_seed=5)
    base = nn.Linear(24, 16).double()
    base.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    config = peft.VeraConfig(r=4, d_initial=0.3, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    b, d = theirs.vera_lambda_b["default"], theirs.vera_lambda_d["default"]
    assert torch.equal(d, torch.full((4,), 0.3).to(d.dtype)) and not b.any()
    with torch.no_grad():
        b.data, d.data = layer.vera_b.detach().clone(), layer.vera_d.detach().clone()
        theirs.vera_A["default"] = layer.vera_A.t().clone()
        theirs.vera_B["default"] = size(4, 24) * layer.vera_B
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    ours, expected = layer(x), theirs(x)
    torch.testing.assert_close(ours, expected)
    found = gradients(ours, x, layer.vera_b, layer.vera_d)
    for one, other in zip(found, gradients(expected, x, b, d)):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(merged_weight(layer) - layer.weight.float(), theirs.get_delta_weight("default").float())


def test_layers_of_all_widths_share_their_matrices(adapter_config):
    model = nn.ModuleDict({"layer": nn.Linear(24, 16), "other": nn.ModuleDict({"layer": nn.Linear(32, 40)})})
    inject(model, adapter_config("vera", rank=8, init_seed=3))
    small, large = model["layer"], model["other"]["layer"]
    assert torch.equal(large.vera_A[:24], small.vera_A) and torch.equal(large.vera_B[:16], small.vera_B)
    assert small.vera_A.min() >= -1 and small.vera_A.max() <= 1
    inject(again := nn.ModuleDict({"layer": nn.Linear(24, 16)}), adapter_config("vera", rank=8, init_seed=4))
    assert not torch.equal(again["layer"].vera_A, small.vera_A)


def test_a_seed_means_the_same_matrix_in_every_version():
    drawn = shared(7, 0, 64, 16, torch.float32)[:64]
    digest = hashlib.sha256(drawn.numpy().tobytes()).hexdigest()[:16]
    assert digest == "3d930ca996bf3e2e"


def test_the_matrices_have_the_size_of_kaiming_initialization():
    rank, width = 256, 1024
    A, B = (shared(0, axis, width, rank, torch.float64)[:width] for axis in (1, 0))
    change = size(rank, width) * (B @ A.t())
    assert change.square().mean().sqrt().item() == pytest.approx((2 / width * 2 / rank * rank) ** 0.5, rel=0.02)


def test_no_cast_of_the_model_changes_the_matrices_or_the_seed(adapt):
    layer = adapt(nn.Linear(24, 16), "vera", init_seed=255)
    told = merged_weight(layer)
    layer.vera_b.data, layer.vera_d.data = layer.vera_b.bfloat16().float(), layer.vera_d.bfloat16().float()
    told = merged_weight(layer) - layer.weight
    layer.bfloat16()
    weight = torch.zeros(16, 24)
    params = {name: tensor.detach() for name, tensor in layer.params.items()}
    torch.testing.assert_close(METHOD.change.delta(weight, params), told, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", [-1.0, 0.5, 256.0, float("nan"), float("inf")])
@pytest.mark.parametrize("variant", ["vera", "shira"])
def test_a_seed_that_is_none_is_refused(seed, variant, adapter_config):
    initial = {f"layer.{variant}_seed": torch.tensor([seed])}
    with pytest.raises(UserError, match="a whole number from 0 to 255 is due; the file is damaged"):
        inject(nn.ModuleDict({"layer": nn.Linear(24, 16)}), adapter_config(variant), initial=initial)


@pytest.mark.parametrize(
    "variant, settings, words",
    [
        ("vera", {"init_seed": 256}, "vera_seed 256: a seed is a whole number from 0 to 255"),
        ("vera", {"d_initial": 0.0}, "d_initial 0.0: b would never move"),
        ("shira", {"entries": 0}, "entries 0: at least one entry"),
        ("shira", {"entries": 25}, "entries in --peft_config 25 is more than the 24 entries of a row at layer"),
        ("bone", {"d_initial": 0.5}, "d_initial 0.5 belongs to --peft vera, and --peft is bone"),
    ],
)
def test_settings_that_make_no_sense_are_refused(variant, settings, words, adapter_config):
    with pytest.raises(UserError) as error:
        inject(nn.ModuleDict({"layer": nn.Linear(24, 16)}), adapter_config(variant, **settings))
    assert words in str(error.value)
