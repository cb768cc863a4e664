"""DoRA and rsLoRA against the formulas of their papers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.adapters.product import Frozen
from rwkv_peft.cli.errors import UserError


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


def test_a_row_of_zeros_stays_one():
    base = nn.Linear(8, 4, bias=False)
    base.weight.data[1] = 0
    inject(model := nn.ModuleDict({"layer": base}), config("dora", rank=2))
    y = model["layer"](torch.randn(3, 8))
    assert torch.isfinite(y).all() and not y[:, 1].any()


def test_what_cannot_be_taken_off_is_refused():
    _, weight, params, _ = tensors()
    with pytest.raises(UserError, match="gain of dora is -1"):
        METHODS["dora"].change.opposite(params | {"lora_gain": torch.full((16,), -1.0)}, 0.5)
    long = METHODS["dora"].change.opposite(params | {"lora_B": 100 * params["lora_B"]}, 0.5)
    with pytest.raises(UserError, match="as long as a row of the base"):
        METHODS["dora"].change.removed(weight, long, 0.5)


def config(name, **settings):
    from rwkv_peft.adapters.methods import words_of
    from rwkv_peft.config import AdapterConfig

    return AdapterConfig(**words_of(METHODS[name]), targets=("layer",), **settings)


def test_rslora_divides_by_the_root_of_the_rank():
    assert METHODS["rslora"].scale(config("rslora", rank=16, alpha=8.0)) == 2.0
    assert METHODS["rslora"].alpha.alpha(2.0, 16) == 8.0
