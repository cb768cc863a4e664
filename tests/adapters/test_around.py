"""Adapters whose terms of low rank go through the kernel of the squared relu between them compute what they do apart
from it; and who does so."""

import copy

import pytest
import torch
from torch import nn

from rwkv_peft.adapters.layer import AdapterLinear, untrained
from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.models.parts import Input, feed_forward
from rwkv_peft.ops import adding

AROUND = [name for name, method in METHODS.items() if method.around_square is not None]


def two_layers(adapt, variant, channels=(16, 24), dtype=torch.float64, bias=False, trains=False, **settings):
    """The layers before and after a square, which a method adapts."""
    layers = [
        adapt(nn.Linear(*sides, bias=bias).to(dtype), variant, **settings) for sides in (channels, channels[::-1])
    ]
    for layer in layers if trains else ():
        layer.weight.requires_grad_(True)
        layer.bias.requires_grad_(True)
    return layers


def results(layers, x, residual):
    """The feed-forward's result, and the gradients of all that has one."""
    key, value = copy.deepcopy(layers)
    leaves = [leaf.clone().requires_grad_() for leaf in (x, residual)]
    y, _ = feed_forward(key, value, Input(leaves[0]), leaves[1])
    y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape))
    leaves += [*key.parameters(), *value.parameters()]
    return [y, *(leaf.grad for leaf in leaves if leaf.requires_grad)]


def both(layers, monkeypatch):
    """Results apart from the square, and in its pass."""
    generator = torch.Generator().manual_seed(1)
    sides, dtype = (layers[0].in_features, layers[1].out_features), next(layers[0].parameters()).dtype
    x, residual = (torch.randn(2, 5, side, generator=generator).to(dtype) for side in sides)
    apart = results(layers, x, residual)
    opened, closed = [], AdapterLinear.closed
    monkeypatch.setattr(AdapterLinear, "around_square", lambda self, *_: True)
    monkeypatch.setattr(AdapterLinear, "closed", lambda *given: (opened.append(1), closed(*given))[1])
    together = results(layers, x, residual)
    assert opened
    return apart, together


@pytest.mark.parametrize("bias, trains", [(False, False), (True, True)], ids=("frozen", "trained"))
@pytest.mark.parametrize("variant", AROUND)
def test_the_results_are_those_of_the_layers_by_themselves(adapt, variant, bias, trains, monkeypatch):
    """With ranks that divide the channels and, where the method takes it, one that does not."""
    for rank in (4, 5) if METHODS[variant].fit(5, 5, 16, 24) is None else (4,):
        layers = two_layers(adapt, variant, bias=bias, trains=trains, rank=rank)
        with monkeypatch.context() as patch:
            apart, together = both(layers, patch)
        for found, true in zip(together, apart, strict=True):
            torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variants", [("bat-in", "lora"), ("bone", "bat-in"), ("bat-in-scaled", "bat-in")])
def test_layers_of_two_methods(adapt, variants, monkeypatch):
    """Which a model has not, but two layers may be."""
    layers = [two_layers(adapt, variant)[i] for i, variant in enumerate(variants)]
    for found, true in zip(*both(layers, monkeypatch), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ("bat-in", "bat-in-scaled"))
def test_of_the_wide_tensors_one_is_kept(adapt, variant, monkeypatch):
    """The square's input, and neither the square nor what is made of it."""
    layers = two_layers(adapt, variant)
    monkeypatch.setattr(AdapterLinear, "around_square", lambda self, *_: True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        y, _ = feed_forward(*layers, Input(torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)))
    assert [x.numel() for x in kept.values()].count(2 * 5 * 24) == 1 and y.requires_grad


@pytest.mark.parametrize("variant", AROUND)
def test_the_product_after_adds_the_residual_itself(adapt, variant, monkeypatch):
    monkeypatch.setattr(adding, "inside_product", lambda *_: True)
    for found, true in zip(*both(two_layers(adapt, variant), monkeypatch), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ("bone", "lora", "bat-in"))
def test_quantized_weights_too(adapt, variant, monkeypatch):
    pytest.importorskip("bitsandbytes")
    layers = two_layers(adapt, variant, dtype=torch.float32, quant="nf4")
    for found, true in zip(*both(layers, monkeypatch), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)


def around(layers, dtype=torch.bfloat16, device="meta", channels=128):
    """What the layers say on a GPU, for which tensors without data stand."""
    x = torch.empty(1, 3, layers[0].in_features, dtype=dtype, device=device)
    return [layer.to(device).around_square(x, channels) for layer in layers]


def layers_of(adapt, variant, dtype=torch.bfloat16, **settings):
    return two_layers(adapt, variant, (64, 128), dtype, **{"rank": 16} | settings)


@pytest.mark.parametrize("variant", METHODS)
def test_a_gpu_takes_the_methods_that_have_the_form(adapt, variant):
    assert around(layers_of(adapt, variant)) == 2 * [variant in AROUND]


def test_what_the_kernel_has_not_stays_apart(adapt):
    assert around(layers_of(adapt, "bone", torch.float32), torch.float32) == [False, False]
    assert around(layers_of(adapt, "bone", torch.float32)) == [False, False]  # parameters of another dtype
    assert around(layers_of(adapt, "bone", rank=24)) == [False, False]
    assert around(layers_of(adapt, "bone"), channels=96) == [False, False]
    assert around(layers_of(adapt, "bone"), device="cpu") == [False, False]


def test_dropout_counts_in_training_alone(adapt):
    layers = layers_of(adapt, "lora", dropout=0.1)
    assert around([layer.train() for layer in layers]) == [False, False]
    assert around([layer.eval() for layer in layers]) == [True, True]


def test_a_layer_as_before_training_stays_apart(adapt):
    layers = nn.ModuleList(layers_of(adapt, "pissa"))
    with untrained(layers):
        assert around(layers) == [False, False]
    assert around(layers) == [True, True]


def test_parameters_that_are_cut_are_used_in_their_layer_alone(adapt):
    """As those of ZeRO-3, which have their whole shape in ds_shape."""
    layers = [layer.to("meta") for layer in layers_of(adapt, "bone")]
    layers[1].bone.ds_shape = layers[1].bone.shape
    assert around(layers) == [True, False]


def test_one_adapted_layer_of_two_stays_apart(adapt):
    key, value = two_layers(adapt, "bone", (64, 128), torch.bfloat16, rank=16)
    plain = nn.Linear(64, 128, bias=False).bfloat16()
    x = torch.empty(1, 3, 64, dtype=torch.bfloat16, device="meta")
    assert feed_forward(plain.to("meta"), value.to("meta"), Input(x))[0].shape == x.shape
