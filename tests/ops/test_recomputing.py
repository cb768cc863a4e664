"""Recurrences in blocks that the backward pass recomputes: the same gradients as in blocks that are kept."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rwkv_peft.ops.wkv6 import wkv6
from rwkv_peft.ops.wkv7 import wkv7


def of_wkv6(x):
    r, k, v, w = x.unbind()
    return wkv6(r, k, v, w, r[0, 0])[0]


def of_wkv7(x):
    r, k, v, w = x.unbind()
    a = torch.nn.functional.normalize(k, dim=-1)
    return wkv7(r, w, k, v, -a, a * v.sigmoid())[0]


@pytest.mark.parametrize("function", [of_wkv6, of_wkv7])
def test_recomputing_gives_the_same_gradients(function):
    torch.manual_seed(0)
    x = torch.randn(4, 2, 70, 2, 8)
    kept, recomputed = x.clone().requires_grad_(), x.clone().requires_grad_()
    function(kept).square().sum().backward()
    checkpoint(function, recomputed, use_reentrant=False).square().sum().backward()
    assert torch.equal(kept.grad, recomputed.grad)
