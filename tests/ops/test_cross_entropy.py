"""Cross-entropy with its gradient: the CPU kernel, the GPU's on tests/cuda_shim and the plain form against torch's own
in float64."""

import pytest
import torch
import torch.nn.functional as F

from cuda_shim.shim import ORDERS, built, record
from rwkv_peft.ops import cross_entropy as op
from rwkv_peft.ops.cross_entropy import CPU, CUDA, cross_entropy_

FORMS = ("plain", "cpu", "cuda")


@pytest.fixture
def on_shim(monkeypatch):
    """Send CPU tensors through the CUDA kernel; the losses that it should fill begin as NaN."""
    shim, run = built(CUDA), op.call

    def call(logits, tensors, **numbers):
        tensors["losses"].fill_(float("nan"))
        run(logits, tensors, **numbers)

    monkeypatch.setattr(CUDA, "kernels", lambda device: shim)
    monkeypatch.setattr(op, "call", call)
    monkeypatch.setattr(op, "backend", lambda logits: op.cuda_losses_ if logits.dtype == torch.bfloat16 else None)
    return shim


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(CPU, "unavailable", lambda: "no compiler")
    elif request.param == "cuda":
        request.getfixturevalue("on_shim")
    elif CPU.unavailable():
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
@pytest.mark.parametrize("n, V", [(1, 1), (3, 7), (5, 257), (4, 1000), (3, 4100), (2, 65536)])
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


def largest_target(logits, targets):
    targets[:] = logits.argmax(1)


def huge_logit(logits, targets):
    logits[1, 7], targets[1] = 1e4, 7


def no_probability(logits, targets):
    targets[:] = 4999
    logits[:, :4990] = -float("inf")


@pytest.mark.parametrize("change", [largest_target, huge_logit, no_probability])
def test_extreme_logits(form, change):
    logits, targets = problem(2, 5000)
    change(logits, targets)
    pull = 0.01 if change is largest_target else 0.0
    loss, gradient = truth(logits, targets, 1.0, pull)
    ours, ours_gradient = cross_entropy_(logits, targets, 1.0, pull)
    torch.testing.assert_close((ours.double(), ours_gradient.double()), (loss, gradient), rtol=1e-5, atol=1e-6)


def test_a_nan_comes_through(form):
    logits, targets = problem(3, 40)
    logits[0, 5] = float("nan")
    assert cross_entropy_(logits, targets, 1.0, each=True)[0].isnan().tolist() == [True, False, False]


def test_float64_takes_the_plain_form():
    logits, targets = problem(3, 40)
    loss, gradient = truth(logits, targets, 1.0, 0.0)
    ours, ours_gradient = cross_entropy_(logits.double(), targets, 1.0)
    torch.testing.assert_close((ours, ours_gradient), (loss, gradient), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", (-1, 40))
def test_a_target_outside_the_vocabulary_is_refused(target):
    if CPU.unavailable():
        pytest.skip("no C++ compiler")
    with pytest.raises(IndexError, match="40 logits.*tokenizer"):
        cross_entropy_(torch.randn(2, 40), torch.tensor([0, target]), 1.0)


def test_a_target_outside_the_vocabulary_is_nan_on_a_gpu(on_shim):
    logits, _ = problem(3, 40)
    loss, gradient = cross_entropy_(logits.bfloat16(), torch.tensor([0, 40, -1]), 1.0)
    assert loss.isnan() and gradient.isfinite().all()


@pytest.mark.parametrize("order", ORDERS[1:])
def test_the_order_of_threads_changes_no_bit(on_shim, order):
    logits, targets = problem(3, 5001)
    expected = cross_entropy_(logits.bfloat16(), targets, 1.0, 0.01)
    on_shim.set_order(order)
    found = cross_entropy_(logits.bfloat16(), targets, 1.0, 0.01)
    assert all(torch.equal(x, y) for x, y in zip(found, expected))


def test_the_driver_is_asked_for_a_block_a_row(monkeypatch):
    recorder = record(CUDA, monkeypatch)
    logits, targets = problem(5, 48)
    logits = logits.bfloat16()
    op.cuda_losses_(logits, targets, 0.5, 0.25, True)
    ((sizes, stream, arguments, _),) = recorder.launches
    assert sizes[:4] == [5, 1, 1, recorder.constant] and stream == 7
    assert (arguments.vocabulary, arguments.scale, arguments.pull) == (48, 0.5, 0.25)
    assert arguments.logits == arguments.gradient == logits.data_ptr()
