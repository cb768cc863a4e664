"""The start of each method of the LoRA family, against the formulas of its paper."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adapters.layers import merged_weight
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.methods import method_of
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
