"""Layers that are given their input's sums over shards compute what they do without them; and which ask for them."""

import pytest
import torch
from torch import nn

from adapters.test_bent import results
from rwkv_peft.adapters import layer as adapter_layer
from rwkv_peft.adapters.layer import AdapterLinear, untrained
from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.models.parts import Input, bones_of, feed_forward
from rwkv_peft.ops.bone import shard_sum

SUMMED = ("bone", "bone-mini")


@pytest.fixture
def taken(monkeypatch):
    """Any input may come with its sums, as if on a GPU."""
    monkeypatch.setattr(adapter_layer, "takes_sums", lambda *_: True)


class Summed(torch.autograd.Function):
    """x (..., in), rank -> x, and its sums over shards (T, r)."""

    @staticmethod
    def forward(ctx, x, rank):
        ctx.rank = rank
        return x.clone(), shard_sum(x.flatten(0, -2), rank)

    @staticmethod
    def backward(ctx, g, g_sums):
        repeats = -(-g.shape[-1] // ctx.rank)
        return g + g_sums.repeat(1, repeats)[:, : g.shape[-1]].view(g.shape), None


def given(x, layer):
    """x as a norm gives it to a layer that asks for sums."""
    (rank,) = bones_of([layer], x)
    return Input(*Summed.apply(x, rank))


@pytest.mark.parametrize("quant, trains", [("none", False), ("none", True), ("nf4", False)])
@pytest.mark.parametrize("rank", (4, 5))
@pytest.mark.parametrize("variant", SUMMED)
def test_the_results_are_those_of_the_input_itself(adapt, variant, rank, quant, trains, taken):
    """With a residual too, of a frozen weight and one that trains."""
    if quant != "none":
        pytest.importorskip("bitsandbytes")
    exact = quant == "none"
    layer = adapt(nn.Linear(16, 24).to(torch.float64 if exact else torch.float32), variant, rank=rank, quant=quant)
    if exact:
        layer.weight.requires_grad_(trains), layer.bias.requires_grad_(trains)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).to(layer.bone.dtype)
    residual = torch.randn(2, 5, 24).to(x)
    for found, true in (
        (lambda x: given(x, layer).through(layer), layer),
        (lambda x: given(x, layer).through(layer, residual), lambda x: layer(x, residual)),
    ):
        for one, other in zip(results(found, [layer], x), results(true, [layer], x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9 if exact else 1e-4, atol=1e-12 if exact else 1e-5)


@pytest.mark.parametrize("around", (False, True))
def test_a_squared_relu_after_it(adapt, around, monkeypatch, taken):
    key, value = (adapt(nn.Linear(*sides).double(), "bone") for sides in ((16, 24), (24, 16)))
    monkeypatch.setattr(AdapterLinear, "around_square", lambda self, *_: around)
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = results(lambda x: feed_forward(key, value, given(x, key))[0], [key, value], x)
    true = results(lambda x: feed_forward(key, value, Input(x))[0], [key, value], x)
    for one, other in zip(found, true, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_sums_that_have_no_gradient_give_none(adapt, taken):
    """The first block's, where the embedding is frozen."""
    layer, x = adapt(nn.Linear(16, 24).double(), "bone"), torch.randn(1, 3, 16, dtype=torch.float64)
    layer.weight.requires_grad_(False)
    bone = torch.autograd.grad(layer(x, shift=shard_sum(x[0], 4)).sum(), layer.bone)
    assert torch.equal(*bone, *torch.autograd.grad(layer(x).sum(), layer.bone))


@pytest.mark.parametrize("variant", METHODS)
def test_the_methods_that_ask_for_sums(adapt, variant, taken):
    """Whether others use the input or not."""
    layer = adapt(nn.Linear(16, 24), variant, rank=4)
    expected = [4 if variant in SUMMED else None]
    assert bones_of([layer], torch.zeros(1, 16)) == bones_of([layer], torch.zeros(1, 16), kept=0) == expected


def test_who_does_not_ask(adapt, taken):
    """A layer under autocast, or before training."""
    x, layer = torch.zeros(1, 16), adapt(nn.Linear(16, 24), "bone")
    with untrained(layer):
        assert layer.bones(x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.bones(x) is None
    assert layer.bones(x) == 4


def test_asking_names_no_parameter(adapt, taken, monkeypatch):
    """Which ZeRO-3, where it is cut, would gather for the module that names it."""
    layer = adapt(nn.Linear(16, 24), "bone")
    for parameter in layer.parameters():
        parameter.ds_shape = parameter.shape

    def named(self, name):
        assert name not in ("weight", "bias", "bone")
        return nn.Module.__getattr__(self, name)

    monkeypatch.setattr(AdapterLinear, "__getattr__", named)
    assert bones_of([layer], torch.zeros(1, 16)) == [4]


def test_whose_sums_a_gpu_makes(adapt):
    """For which tensors without data stand: whole shards, of widths that the kernels have."""
    for rank, dtype, channels, taken in (
        (16, torch.bfloat16, 128, True),
        (128, torch.float32, 128, True),
        (8, torch.bfloat16, 128, False),
        (64, torch.bfloat16, 96, False),
        (16, torch.float64, 128, False),
        (16, torch.bfloat16, 8192, False),
    ):
        layer = adapt(nn.Linear(channels, 16, bias=False, dtype=dtype), "bone", rank=rank)
        assert layer.bones(torch.zeros(1, 2, channels, dtype=dtype)) is None
        x = torch.empty(1, 2, channels, dtype=dtype, device="meta")
        assert layer.to("meta").bones(x) == (rank if taken else None)
