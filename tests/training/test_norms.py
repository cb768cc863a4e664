"""The norm of gradients against float64's."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import distributed

from rwkv_peft.training.step.zero import NOT_FINITE, SHORT, gradient_norm, square_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (SHORT - 1,), (3, SHORT), (SHORT, 7), (500_001,)])
def test_a_sum_of_squares_is_that_of_float64(shape, dtype):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3).to(dtype)
    assert square_sum(x).item() == pytest.approx(x.double().square().sum().item(), rel=1e-6, abs=0)


def test_the_norm_of_several_and_one_that_is_not_finite(monkeypatch):
    groups = []
    monkeypatch.setattr(distributed, "all_reduce", lambda total, group: groups.append(group))
    optimizer = SimpleNamespace(device="cpu", dp_process_group="all")
    gradients = [torch.full((3, 5), 2.0), torch.zeros(7), torch.full((1,), 2.0)]
    assert gradient_norm(optimizer, gradients).item() == 8.0 and groups == ["all"]
    for value in (float("inf"), float("nan")):
        assert gradient_norm(optimizer, [*gradients, torch.tensor([value])]).item() == NOT_FINITE


@pytest.mark.parametrize("name", ["get_grad_norm_direct", "reduce_independent_p_g_buckets_and_remove_grads"])
def test_the_engine_has_what_the_strategy_replaces(name):
    """Otherwise the strategy would replace nothing, silently."""
    assert callable(getattr(DeepSpeedZeroOptimizer, name))
