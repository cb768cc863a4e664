"""Adapters on a quantized weight: the same laws, and no dequantized copy that lives on."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adapters.layers import merged_weight, tensors_of
from rwkv_peft.adapters import quant as quant_module
from rwkv_peft.adapters.functions.tokens import linear
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.adapters.quant import QuantizedProduct, quantize, roundtrip
from rwkv_peft.cli.errors import UserError

pytest.importorskip("bitsandbytes")
KINDS = ("nf4", "int8")


@pytest.mark.parametrize("kind, limit", [("nf4", 0.11), ("int8", 0.015)])
def test_quantization_errs_as_much_as_its_bits_allow(kind, limit):
    weight = torch.randn(96, 80, generator=torch.Generator().manual_seed(0))
    assert (roundtrip(weight, kind) - weight).norm() <= limit * weight.norm()


@pytest.mark.parametrize("kind, bits", [("nf4", 4.5), ("int8", 8.125)])
def test_a_quantized_layer_holds_the_quantized_weight_alone(kind, bits, adapt):
    layer = adapt(nn.Linear(256, 128, bias=False), "bat-in", quant=kind)
    held = [t for t in (*layer.parameters(), *layer.buffers()) if t is not layer.bone]
    assert sum(t.numel() * t.element_size() for t in held) == 256 * 128 * bits / 8
    assert set(layer.state_dict()) == {"bone"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", METHODS)
@pytest.mark.processor
def test_forward_backward_and_merge_agree_with_the_dequantized_weight(variant, kind, adapt):
    base = nn.Linear(20, 12)
    original = base.weight.detach().clone()
    layer = adapt(base, variant, quant=kind)
    x = torch.randn(2, 5, 20, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, merged_weight(layer), layer.bias))
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * y @ merged_weight(layer), rtol=1e-4, atol=1e-5)
    params = {name: t.detach() for name, t in tensors_of(layer).items()}
    assert torch.equal(METHODS[variant].merged(original, params, scale=layer.scale, quant=kind), merged_weight(layer))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_begin_a_block_and_small_chunks(kind, monkeypatch):
    weight = torch.randn(30, 10)
    whole = roundtrip(weight, kind)
    packed, scales = quantize(weight, kind)
    product = QuantizedProduct(kind, weight.shape, scales)
    for start, stop in ((0, 30), (1, 2), (7, 29), (13, 30)):
        assert torch.equal(product.rows(packed, slice(start, stop), torch.float32), whole[start:stop])
    monkeypatch.setattr(quant_module, "ROW_ELEMENTS", 70)
    z, g = torch.randn(4, 10), torch.randn(4, 30)
    torch.testing.assert_close(product.forward(z, packed), z @ whole.t())
    torch.testing.assert_close(product.backward(g, packed), g @ whole)


def test_a_gpu_multiplies_by_a_7b_models_largest_matrix_at_once():
    product = QuantizedProduct("nf4", (4096, 14336), torch.empty(0))
    chunks = {device: len(list(product._row_chunks(torch.empty(0, device=device)))) for device in ("cpu", "meta")}
    assert chunks == {"cpu": 15, "meta": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_several_products_on_a_gpu_are_summed_in_float32(kind, monkeypatch):
    """Rounded once: where each product rounds the sum, errors add up."""
    monkeypatch.setattr(quant_module, "on_gpu", lambda x: True)
    monkeypatch.setattr(quant_module, "GPU_ROW_ELEMENTS", 64 * 16)
    weight, g = torch.randn(1024, 64), torch.randn(8, 1024, dtype=torch.bfloat16)
    packed, scales = quantize(weight, kind)
    begun = torch.full((8, 64), 1e3, dtype=torch.bfloat16)  # of which single products are a small part
    found = begun.clone()
    QuantizedProduct(kind, weight.shape, scales).add_backward_(found, g, packed)
    exact = begun.double() + g.double() @ roundtrip(weight, kind).bfloat16().double()
    assert (found - exact).abs().max() <= 2**-8 * exact.abs().max()  # a rounding of bfloat16, and a little more


@pytest.mark.parametrize("kind", KINDS)
def test_casting_the_model_leaves_the_scales_alone(kind, adapt):
    layer = adapt(nn.Linear(64, 32), "bone", train=False, quant=kind)
    before = layer.base_weight()
    assert torch.equal(layer.bfloat16().base_weight(), before)
    assert layer(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("variant", ["none", "bat-in", "bat-out", "bone", "lora"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.processor
def test_nothing_of_the_weights_size_is_kept_for_backward(kind, variant, adapt):
    tokens, in_features, out_features = 3, 64, 48
    layer = adapt(nn.Linear(in_features, out_features), "bone" if variant == "none" else variant, quant=kind)
    x = torch.randn(tokens, in_features, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x, layer.frozen) if variant == "none" else layer(x)
    floats = [t for t in saved if t.is_floating_point() and t is not getattr(layer, "bone", None)]
    assert all(t.numel() < in_features * out_features for t in floats)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_layer_compiles_into_one_graph(kind, adapt):
    layer, x = adapt(nn.Linear(64, 32), "bone", quant=kind), torch.randn(3, 64)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()


@pytest.mark.parametrize("error", [ImportError, RuntimeError, OSError])
def test_a_bitsandbytes_that_does_not_import_is_a_users_matter(error, monkeypatch, tmp_path):
    (tmp_path / "bitsandbytes.py").write_text(f"raise {error.__name__}('libcudart is missing')")
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="libcudart is missing.*--quant none"):
        quantize(torch.randn(4, 64), "nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights_count_as_what_they_stand_for(kind, adapter_config):
    plain, quantized = (nn.ModuleDict({"layer": nn.Linear(64, 32)}) for _ in range(2))
    assert inject(plain, adapter_config("bone")) == inject(quantized, adapter_config("bone", quant=kind))
