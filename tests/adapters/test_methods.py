"""The methods one by one: their starts and gradients against the formulas of their papers or Hugging Face peft's
layers, and constants, which nothing may change."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adapters.layers import merged_weight
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.methods import METHODS, method_of
from rwkv_peft.adapters.product import Frozen
from rwkv_peft.cli.errors import UserError


def initial_factors(weight, config, gradient=None):
    """(A0, B0) of a method."""
    factors = method_of(config).held.make(weight, config, gradient)
    return factors["init_lora_A"], factors["init_lora_B"]


@pytest.fixture
def weight():
    return torch.randn(20, 12, generator=torch.Generator().manual_seed(0))


def test_pissa_takes_the_principal_part(weight, adapter_config):
    config = adapter_config("pissa", svd_niter=0)
    a, b = initial_factors(weight, config)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(method_of(config).scale(config) * b @ a, u[:, :4] * s[:4] @ vt[:4])
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))


def test_randomized_pissa_comes_close_and_repeats(weight, adapter_config):
    config = adapter_config("pissa", svd_niter=16)
    exact = initial_factors(weight, adapter_config("pissa", svd_niter=0))
    fast = initial_factors(weight, config)
    torch.testing.assert_close(fast[1] @ fast[0], exact[1] @ exact[0], rtol=0, atol=1e-3)
    torch.manual_seed(5)
    assert all(torch.equal(x, y) for x, y in zip(fast, initial_factors(weight, config)))


def test_olora_takes_the_first_rows_of_a_qr(weight, adapter_config):
    a, b = initial_factors(weight, adapter_config("olora"))
    torch.testing.assert_close(b.t() @ b, torch.eye(4))
    torch.testing.assert_close((b @ a)[:, :4], weight[:, :4])
    assert torch.equal(a[:, :4], a[:, :4].triu())


def test_lora_ga_takes_the_gradients_directions(weight, adapter_config):
    a, b = initial_factors(weight, adapter_config("lora-ga"), gradient=weight)
    u, _, vt = torch.linalg.svd(weight, full_matrices=False)
    scale = 20**0.25 / 16**0.5
    torch.testing.assert_close((a @ vt[:4].t()).abs(), scale * torch.eye(4), rtol=0, atol=1e-3)
    torch.testing.assert_close((b.t() @ u[:, 4:8]).abs(), scale * torch.eye(4), rtol=0, atol=1e-3)


def test_lora_ga_without_gradients_is_refused(adapter_config):
    with pytest.raises(UserError, match="gradient"):
        inject(nn.ModuleDict({"layer": nn.Linear(12, 20)}), adapter_config("lora-ga"))


def test_a_residual_adapter_goes_on_from_the_factors_of_a_file(adapter_config):
    """The base is rebuilt from the file's factors, because a decomposition here may give others."""
    base = nn.Linear(12, 20, bias=False)
    shared = base.weight.detach()
    original = shared.clone()
    factors = {"layer.init_lora_A": torch.randn(4, 12), "layer.init_lora_B": torch.randn(20, 4)}
    model = nn.ModuleDict({"layer": base})
    inject(model, adapter_config("pissa"), initial=factors)
    expected = original - 2.0 * factors["layer.init_lora_B"] @ factors["layer.init_lora_A"]
    torch.testing.assert_close(model["layer"].weight, expected)
    assert torch.equal(shared, original)  # the base's own tensor is left as it was
    with pytest.raises(UserError, match="init_lora_A"):
        inject(nn.ModuleDict({"layer": nn.Linear(12, 20)}), adapter_config("pissa"), initial={"else": torch.ones(1)})


def test_dropout_drops_in_training_alone(adapt):
    layer = adapt(nn.Linear(12, 20), "lora", dropout=0.5)
    x = torch.randn(8, 12)
    expected = F.linear(x, merged_weight(layer), layer.bias)
    torch.testing.assert_close(layer.eval()(x), expected)
    layer.train()
    assert not torch.allclose(layer(x), expected)
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.25)


def tensors(dtype=torch.float64, std=0.3):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 24, dtype=dtype), torch.randn(16, 24, dtype=dtype)
    params = {"lora_A": std * torch.randn(4, 24, dtype=dtype), "lora_B": std * torch.randn(16, 4, dtype=dtype)}
    params |= {"lora_gain": std * torch.randn(16, dtype=dtype), "lora_row_norm": weight.norm(dim=1)}
    return x, weight, params, torch.randn(16, dtype=dtype)


def paper(x, weight, params, bias, scale):
    """Magnitude times direction, the length of the direction detached (section 4.3)."""
    turned = weight + scale * params["lora_B"] @ params["lora_A"]
    magnitude = params["lora_row_norm"] * (1 + params["lora_gain"])
    return F.linear(x, (magnitude / turned.norm(dim=1).detach())[:, None] * turned, bias)


def run(function, x, params, *rest):
    x = x.clone().requires_grad_()
    params = {name: tensor.clone().requires_grad_(name != "lora_row_norm") for name, tensor in params.items()}
    y = function(x, params, *rest)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(y.dtype))
    return [y.detach(), x.grad, *(params[name].grad for name in METHODS["dora"].parameters)]


@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_the_papers(with_bias):
    x, weight, params, bias = tensors()
    bias = bias if with_bias else None
    found = run(lambda x, p: METHODS["dora"].apply(x, Frozen(weight, bias), p, 0.5, 0.0), x, params)
    for ours, theirs in zip(found, run(lambda x, p: paper(x, weight, p, bias, 0.5), x, params)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # lengths are computed in float32


def test_a_small_gain_counts_in_bfloat16():
    """A magnitude of 1.0001 would be rounded to 1."""
    x, weight, params, _ = tensors(torch.float32, std=0.0)
    params = {name: tensor.bfloat16() for name, tensor in params.items()}
    plain = METHODS["dora"].apply(x, Frozen(weight), params, 1.0, 0.0)
    params["lora_gain"] = torch.full((16,), 1e-4, dtype=torch.bfloat16)
    change = METHODS["dora"].apply(x, Frozen(weight), params, 1.0, 0.0) / plain - 1
    torch.testing.assert_close(change, torch.full_like(plain, 1e-4), rtol=1e-2, atol=0)


def test_a_row_of_zeros_stays_one(adapter_config):
    base = nn.Linear(8, 4, bias=False)
    base.weight.data[1] = 0
    inject(model := nn.ModuleDict({"layer": base}), adapter_config("dora", rank=2))
    y = model["layer"](torch.randn(3, 8))
    assert torch.isfinite(y).all() and not y[:, 1].any()


def test_rslora_divides_by_the_root_of_the_rank(adapter_config):
    assert METHODS["rslora"].scale(adapter_config("rslora", rank=16, alpha=8.0)) == 2.0
    assert METHODS["rslora"].alpha.alpha(2.0, 16) == 8.0


def test_a_setting_of_another_method_is_refused(adapter_config):
    with pytest.raises(UserError, match="lora_plus_ratio 4.0 belongs to --peft lora-plus, and --peft is bone"):
        inject(nn.ModuleDict({"layer": nn.Linear(24, 16)}), adapter_config("bone", lora_plus_ratio=4.0))
