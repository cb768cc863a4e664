"""Adapter layers whose products add a residual themselves, as on a GPU: the sum and all gradients, of every method."""

import pytest
import torch
from torch import nn

from rwkv_peft.adapters.layer import untrained
from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.ops import adding

AFTERWARDS = ("dora",)  # whose gain turns what the layer makes, and no residual


@pytest.fixture
def inside(monkeypatch):
    """A CPU's products add the residual, as a GPU's do."""
    monkeypatch.setattr(adding, "inside_product", lambda *_: True)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def results(layer, function, dtype, lead=(2, 5)):
    """y of function(x, residual), and the gradients of x, of the residual and of what trains in the layer."""
    x, residual = (randn(*lead, n, seed=n, dtype=dtype).requires_grad_() for n in (24, 16))
    params = [p for p in layer.parameters() if p.requires_grad]
    y = function(x, residual)
    gradients = torch.autograd.grad(y, (x, residual, *params), randn(*y.shape, seed=1, dtype=dtype))
    return [y.detach(), *gradients]


def assert_close(found, expected):
    for x, true in zip(found, expected, strict=True):
        torch.testing.assert_close(x, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lead", [(1,), (7,), (2, 5), (130,)], ids=str)
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("variant", METHODS)
def test_the_sum_and_all_gradients(variant, bias, lead, adapt, monkeypatch):
    layer = adapt(nn.Linear(24, 16, bias=bias).double(), variant)
    expected = results(layer, lambda x, residual: layer(x) + residual, torch.float64, lead)
    monkeypatch.setattr(adding, "inside_product", lambda *_: True)
    assert_close(results(layer, layer, torch.float64, lead), expected)


@pytest.mark.parametrize("variant", METHODS)
def test_the_sum_is_no_operation_of_its_own(variant, adapt, inside):
    layer = adapt(nn.Linear(24, 16), variant)
    y = layer(torch.randn(3, 24), torch.randn(3, 16))
    assert type(y.grad_fn).__name__.startswith("Add") == (variant in AFTERWARDS)


@pytest.mark.parametrize("variant", METHODS)
def test_bfloat16_errs_no_more_than_twice_an_addition_afterwards(variant, adapt, monkeypatch):
    layer = adapt(nn.Linear(24, 16, bias=False), variant).bfloat16()
    plain = results(layer, lambda x, residual: layer(x) + residual, torch.bfloat16, (64,))
    monkeypatch.setattr(adding, "inside_product", lambda *_: True)
    found = results(layer, layer, torch.bfloat16, (64,))
    layer.double()
    for x, low, true in zip(found, plain, results(layer, layer, torch.float64, (64,)), strict=True):
        assert x.dtype == torch.bfloat16
        assert (x.double() - true).norm() <= 2 * (low.double() - true).norm() + 1e-3 * true.norm()


@pytest.mark.parametrize("variant", METHODS)
def test_a_layer_as_it_began(variant, adapt, inside):
    layer = adapt(nn.Linear(24, 16).double(), variant)
    x, residual = randn(5, 24), randn(5, 16)
    with untrained(layer):
        torch.testing.assert_close(layer(x, residual), layer(x) + residual)


@pytest.mark.parametrize("kind", ("nf4", "int8"))
@pytest.mark.parametrize("variant", METHODS)
def test_on_a_quantized_base(variant, kind, adapt, inside):
    pytest.importorskip("bitsandbytes")
    layer = adapt(nn.Linear(24, 16), variant, quant=kind)
    expected = results(layer, lambda x, residual: layer(x) + residual, torch.float32)
    for x, true in zip(results(layer, layer, torch.float32), expected, strict=True):
        torch.testing.assert_close(x, true, rtol=1e-4, atol=1e-5)


def test_dropout_hides_the_input_and_no_residual(adapt, inside):
    layer = adapt(nn.Linear(24, 16).double(), "lora", dropout=0.5)

    def seeded(function):
        torch.manual_seed(0)
        return results(layer, function, torch.float64)

    assert_close(seeded(layer), seeded(lambda x, residual: layer(x) + residual))


@pytest.mark.parametrize("variant", METHODS)
def test_the_residual_stays_and_its_gradient_is_that_of_the_sum(variant, adapt, inside):
    layer = adapt(nn.Linear(24, 16).double(), variant)
    residual = randn(5, 16, seed=2).requires_grad_()
    begun, g = residual * 1, torch.ones(5, 16, dtype=torch.float64)
    before, seen = begun.detach().clone(), []
    begun.register_hook(seen.append)
    y = layer(randn(5, 24), begun)
    torch.autograd.backward([y, begun], [g, 2 * g])  # begun has two users, whose gradients are added up
    assert torch.equal(begun, before) and torch.equal(g, torch.ones_like(g))
    assert torch.equal(seen[0], 3 * g) and torch.equal(residual.grad, 3 * g)


@pytest.mark.parametrize("variant", METHODS)
def test_under_autocast_the_residual_keeps_its_dtype(variant, adapt):
    layer, x, residual = adapt(nn.Linear(24, 16), variant), torch.randn(3, 24), 1 + 1e-4 * torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = layer(x, residual), layer(x)
    assert y.dtype == torch.float32 and torch.equal(y, plain + residual)


@pytest.mark.parametrize("variant", ("bat-in", "bone", "bat-out", "lora"))
def test_compiles_into_one_graph(variant, adapt, inside):
    layer = adapt(nn.Linear(24, 16).double(), variant)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(results(layer, compiled, torch.float64), results(layer, layer, torch.float64))
