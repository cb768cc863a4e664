"""Layers whose input comes bent compute what they do of the input itself; and which layers let it be bent."""

import pytest
import torch
from torch import nn

from rwkv_peft.adapters import layer as adapter_layer
from rwkv_peft.adapters.layer import AdapterLinear, untrained
from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.models.parts import Input, bones_of, feed_forward, inputs_of
from rwkv_peft.ops import mix

BENT = ("bat-in", "bat-in-scaled")


@pytest.fixture(autouse=True)
def taken(request, monkeypatch):
    """Any input may be bent, as if on a GPU."""
    if "on_a_gpu" not in request.function.__name__:
        monkeypatch.setattr(adapter_layer, "takes_bones", lambda *_: True)


def layer_of(adapt, variant, sides=(16, 24), dtype=torch.float64, bias=True, **settings):
    layer = adapt(nn.Linear(*sides, bias=bias).to(dtype), variant, **settings)
    layer.weight.requires_grad_(False) if layer.quant == "none" else None
    return layer


def results(function, layers, x):
    """What a function gives of x, and the gradients of x and of all that trains in some layers."""
    leaves = [x.clone().requires_grad_(), *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    y = function(leaves[0])
    return [y, *torch.autograd.grad(y, leaves, torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape))]


def bent(x, layer):
    """x as a kernel would bend it for a layer."""
    bones = bones_of([layer], x)
    points, shifts = mix.bent([x], bones)
    (given,) = inputs_of(points, bones, shifts)
    assert given.shift is not None
    return given


@pytest.mark.parametrize("quant", ("none", "nf4"))
@pytest.mark.parametrize("variant", BENT)
def test_the_results_are_those_of_the_input_itself(adapt, variant, quant):
    if quant != "none":
        pytest.importorskip("bitsandbytes")
    exact = quant == "none"
    layer = layer_of(adapt, variant, dtype=torch.float64 if exact else torch.float32, quant=quant)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).to(layer.bone.dtype)
    residual = torch.randn(2, 5, 24).to(x)
    for found, true in (
        (lambda x: bent(x, layer).through(layer), layer),
        (lambda x: layer(bent(x, layer).x, residual, bent(x, layer).shift), lambda x: layer(x, residual)),
    ):
        for one, other in zip(results(found, [layer], x), results(true, [layer], x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9 if exact else 1e-4, atol=1e-12 if exact else 1e-5)


@pytest.mark.parametrize("around", (False, True))
@pytest.mark.parametrize("variant", BENT)
def test_a_squared_relu_after_it(adapt, variant, around, monkeypatch):
    key, value = layer_of(adapt, variant, bias=False), layer_of(adapt, variant, (24, 16), bias=False)
    monkeypatch.setattr(AdapterLinear, "around_square", lambda self, *_: around)
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = results(lambda x: feed_forward(key, value, bent(x, key))[0], [key, value], x)
    true = results(lambda x: feed_forward(key, value, Input(x))[0], [key, value], x)
    for one, other in zip(found, true, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", METHODS)
def test_the_methods_that_bend_their_input(adapt, variant):
    layer = layer_of(adapt, variant, rank=4)
    assert (layer.bones(torch.zeros(1, 16)) is not None) == (variant in BENT)


def test_what_keeps_an_input_as_it_is(adapt):
    """A weight that trains, which needs it; autocast; a layer before training; parameters that ZeRO-3 cuts; and no
    adapter at all."""
    x, layer = torch.zeros(1, 16), layer_of(adapt, "bat-in", dtype=torch.float32)
    with untrained(layer):
        assert layer.bones(x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.bones(x) is None
    layer.weight.requires_grad_(True)
    assert layer.bones(x) is None
    layer.weight.requires_grad_(False)
    assert layer.bones(x.bfloat16()).dtype == torch.bfloat16
    layer.bone.ds_shape = layer.bone.shape
    assert bones_of([layer, nn.Linear(16, 16), None], x) == [None, None, None]


def test_what_is_bent_on_a_gpu(adapt):
    """For which tensors without data stand: bfloat16, whole steps of channels, ranks that the kernels have."""
    for rank, dtype, channels, taken in (
        (16, torch.bfloat16, 128, True),
        (8, torch.bfloat16, 128, False),
        (16, torch.float32, 128, False),
        (16, torch.bfloat16, 96, False),
    ):
        layer = layer_of(adapt, "bat-in", (channels, channels), dtype, bias=False, rank=rank)
        assert layer.bones(torch.zeros(1, 2, channels, dtype=dtype)) is None
        x = torch.empty(1, 2, channels, dtype=dtype, device="meta")
        assert (layer.to("meta").bones(x) is not None) == taken


def test_points_that_no_kernel_bent_are_inputs_as_they_are(adapt):
    layer, x = layer_of(adapt, "bat-in"), torch.zeros(1, 2, 16, dtype=torch.float64)
    bones = bones_of([layer, None], x)
    assert [one.shift for one in inputs_of([x, x], bones, ())] == [None, None]
    assert [one.shift is None for one in inputs_of([x, x], bones, [x[0]])] == [False, True]
