"""The chunked head loss equals plain cross-entropy in value and gradients, whatever the chunking and the mask."""

import pytest
import torch
import torch.nn.functional as F

from rwkv_peft.data.samples import positions
from rwkv_peft.objectives import cross_entropy as module
from rwkv_peft.objectives.cross_entropy import linear_cross_entropy


def plain(hidden, weight, targets, mask, count, l2wrap):
    """The same loss through full logits; L2Wrap as the penalty l2wrap / 2 · max² whose gradient it is."""
    logits = F.linear(hidden, weight).flatten(0, 1)
    nll = F.cross_entropy(logits, targets.flatten(), reduction="none")
    counted = mask.flatten().to(nll.dtype)
    penalty = 0.5 * l2wrap * logits.max(dim=1).values.square()
    return (nll * counted).sum() / count, ((nll + penalty) * counted).sum() / count


def problem(B=2, T=7, C=12, V=33, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, C, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(V, (B, T), generator=generator)
    mask = torch.rand(B, T, generator=generator) < 0.6
    return hidden, weight, targets, mask


@pytest.mark.parametrize("elements", [1, 33 * 4, 2**25])
@pytest.mark.parametrize("l2wrap", [0.0, 0.01])
def test_value_and_gradients(monkeypatch, elements, l2wrap):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    hidden, weight, targets, mask = problem()
    value, with_penalty = plain(hidden, weight, targets, mask, 5, l2wrap)
    expected = torch.autograd.grad(3 * with_penalty, (hidden, weight))
    ours = linear_cross_entropy(hidden, weight, targets, positions(mask), 5, l2wrap)
    torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(3 * ours, (hidden, weight)), expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # the second by the kernel, where it can be built
def test_weights_multiply_values_and_gradients(dtype):
    hidden, weight, targets, mask = problem(dtype=dtype)
    weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) * 3 * mask
    value, with_penalty = plain(hidden, weight, targets, weights, 5, 0.01)
    expected = torch.autograd.grad(3 * with_penalty, (hidden, weight))
    ours = linear_cross_entropy(hidden, weight, targets, positions(mask), 5, 0.01, weights)
    close = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours, value, **close)
    for mine, theirs in zip(torch.autograd.grad(3 * ours, (hidden, weight)), expected):
        torch.testing.assert_close(mine, theirs, **close)
    same = linear_cross_entropy(hidden, weight, targets, positions(mask), 5, 0.01, torch.full(mask.shape, 2.0))
    torch.testing.assert_close(same, 2 * linear_cross_entropy(hidden, weight, targets, positions(mask), 5), **close)


def test_nothing_to_learn_is_zero_not_nan():
    hidden, weight, targets, mask = problem()
    value = linear_cross_entropy(hidden, weight, targets, positions(torch.zeros_like(mask)), 1)
    assert value.item() == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(value, (hidden, weight)))


def test_frozen_head_gets_no_gradient_and_saves_no_logits():
    hidden, weight, targets, mask = problem(V=500)
    weight = weight.detach()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        value = linear_cross_entropy(hidden, weight, targets, positions(mask), 5)
    value.backward()
    assert hidden.grad is not None
    assert sum(saved) == hidden.numel()


def test_bfloat16_loses_no_more_than_plain_bfloat16():
    hidden, weight, targets, mask = problem(B=2, T=64, C=64, V=500, dtype=torch.float32)
    exact_value, exact = plain(hidden.double(), weight.double(), targets, mask, 70, 0.0)
    exact_grad = torch.autograd.grad(exact, hidden)[0]
    low_hidden, low_weight = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight))
    low = linear_cross_entropy(low_hidden, low_weight, targets, positions(mask), 70, 0.0)
    naive_value, naive = plain(low_hidden, low_weight, targets, mask, 70, 0.0)
    naive_grad, grad = (torch.autograd.grad(value, low_hidden, retain_graph=True)[0] for value in (naive, low))
    assert (low - exact_value).abs() <= 2 * (naive_value - exact_value).abs() + 1e-3
    assert (grad - exact_grad).norm() <= 2 * (naive_grad - exact_grad).norm()
