"""Cross-entropy with its gradient: the CPU kernel and the plain form against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F

from rwkv_peft.ops import cross_entropy
from rwkv_peft.ops.cross_entropy import cross_entropy_

FORMS = ("plain", "kernel")


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(cross_entropy, "available", lambda: False)
    elif not cross_entropy.available():
        pytest.skip("no C++ compiler")
    return request.param


def problem(n, V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(n, V, generator=generator), torch.randint(V, (n,), generator=generator)


def truth(logits, targets, scale, pull):
    """Loss and gradient in float64; the pull is the gradient of pull / 2 · max²."""
    leaf = logits.double().requires_grad_()
    loss = F.cross_entropy(leaf, targets, reduction="sum") * scale
    penalty = 0.5 * pull * leaf.max(dim=1).values.square().sum() * scale
    return loss.detach(), torch.autograd.grad(loss + penalty, leaf)[0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("n, V", [(1, 1), (3, 7), (5, 257), (4, 1000), (2, 65536)])
@pytest.mark.parametrize("pull", (0.0, 0.01))
def test_loss_and_gradient(form, n, V, dtype, pull):
    logits, targets = problem(n, V)
    logits = logits.to(dtype)
    loss, gradient = truth(logits, targets, 0.25, pull)
    assert cross_entropy_(logits.clone(), targets, 0.25, pull, gradient=False)[1] is None
    ours, ours_gradient = cross_entropy_(logits.clone(), targets, 0.25, pull)
    assert ours.dtype == torch.float32 and ours_gradient.dtype == dtype
    torch.testing.assert_close(ours.double(), loss, rtol=1e-5, atol=1e-6)
    assert (ours_gradient.double() - gradient).norm() <= 4 * torch.finfo(dtype).eps * gradient.norm() + 1e-7


def test_the_target_may_be_the_largest(form):
    logits, _ = problem(6, 300)
    targets = logits.argmax(1)
    _, gradient = truth(logits, targets, 1.0, 0.01)
    torch.testing.assert_close(cross_entropy_(logits, targets, 1.0, 0.01)[1], gradient.float(), rtol=1e-4, atol=1e-5)


def test_nan_and_huge_logits(form):
    logits, targets = problem(3, 40)
    logits[0, 5], logits[1, 7] = float("nan"), 1e4
    targets[1] = 7
    for row, expected in ((0, float("nan")), (1, 0.0)):
        loss, _ = cross_entropy_(logits[row : row + 1].clone(), targets[row : row + 1], 1.0)
        torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)


def test_float64_takes_the_plain_form():
    logits, targets = problem(3, 40)
    loss, gradient = truth(logits, targets, 1.0, 0.0)
    ours, ours_gradient = cross_entropy_(logits.double(), targets, 1.0)
    torch.testing.assert_close((ours, ours_gradient), (loss, gradient), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", (-1, 40))
def test_a_target_outside_the_vocabulary_is_refused(target):
    if not cross_entropy.available():
        pytest.skip("no C++ compiler")
    with pytest.raises(IndexError, match="40 logits.*tokenizer"):
        cross_entropy_(torch.randn(2, 40), torch.tensor([0, target]), 1.0)
