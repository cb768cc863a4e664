"""The squared relu with terms of low rank around it: its CUDA kernels, run on the CPU through tests/cuda_shim, against
the float64 plain form; under several orders of the threads."""

import copy

import pytest
import torch
from torch import nn

from cuda_shim import shim
from ops.mix.cases import randn
from rwkv_peft.adapters.inject import inject
from rwkv_peft.config import AdapterConfig
from rwkv_peft.models.parts import Input, feed_forward
from rwkv_peft.ops.mix import cuda, functions, gpu_lerp, low_square, op, relu_square, square

WAYS = ("none", "repeated", "rows", "columns")  # of a term: missing, of the identity, of a matrix as it lies in memory


def matrix(way, rank, width, seed):
    """(r, F), or None."""
    if way in ("none", "repeated"):
        return None
    return randn(rank, width, seed=seed) / 4 if way == "rows" else randn(width, rank, seed=seed).t() / 4


def case(rank, width, tokens, before, after):
    """x, left, up, down, all but the last as low_square takes them; down is (r, F)."""
    left = None if before == "none" else randn(tokens, rank, seed=2)
    inputs = [randn(1, tokens, width), left, matrix(before, rank, width, 3), matrix(after, rank, width, 4)]
    return [x if x is None else x.bfloat16() for x in inputs]


def results(inputs, rank, dtype, sums=True, frozen=()):
    """Outputs and the gradients of what is there and not frozen."""
    leaves = [
        None if x is None else x.detach().to(dtype, copy=True).requires_grad_(i not in frozen)
        for i, x in enumerate(inputs)
    ]
    x, left, up, down = leaves
    outs = [out for out in low_square(x, left, up, None if down is None else down.t(), rank, sums) if out is not None]
    torch.autograd.backward(outs, [randn(*out.shape, seed=7 + i).to(dtype) for i, out in enumerate(outs)])
    return [*outs, *(x.grad for x in leaves if x is not None and x.requires_grad)]


@pytest.fixture
def assert_as_exact(kernels, monkeypatch):
    """That results are at most twice as far from float64 as plain bfloat16 torch's."""

    def check(inputs, rank, sums=True, **way):
        found = results(inputs, rank, torch.bfloat16, sums, **way)
        assert "LowSquare" in type(found[0].grad_fn).__name__
        true = results(inputs, rank, torch.float64, sums, **way)
        with monkeypatch.context() as patch:
            patch.setattr(op, "fused", lambda *_: False)
            plain = results(inputs, rank, torch.bfloat16, sums, **way)
        for i, (x, low, exact) in enumerate(zip(found, plain, true, strict=True)):
            assert x.shape == low.shape and x.dtype == torch.bfloat16
            assert (x.double() - exact).norm() <= 2 * (low.double() - exact).norm() + 1e-5 * exact.norm(), i

    return check


@pytest.mark.parametrize("rank", cuda.SQUARE_RANKS)
@pytest.mark.parametrize("before", WAYS)
@pytest.mark.parametrize("after", WAYS)
def test_each_term_before_and_after(assert_as_exact, before, after, rank):
    """Two tiles of tokens, the second of few; channels that are no whole number of shards of rank 128."""
    assert_as_exact(case(rank, 192, 71, before, after), rank, sums=after != "none")


@pytest.mark.parametrize("tokens, groups", [(1, 1), (16, 3), (64, 8), (129, 3)])
def test_channels_in_several_groups(assert_as_exact, tokens, groups, monkeypatch):
    monkeypatch.setattr(gpu_lerp, "MOST_GROUPS", groups)
    for before, after in (("rows", "repeated"), ("repeated", "rows"), ("columns", "rows")):
        assert_as_exact(case(64, 320, tokens, before, after), 64)


def test_frozen_matrices_have_no_gradient(assert_as_exact):
    assert_as_exact(case(16, 64, 5, "rows", "rows"), 16, frozen=(2, 3))


def test_without_terms_it_is_the_squared_relu(kernels):
    x = randn(1, 70, 128).bfloat16()
    found, expected = (
        results([x, None, None, None], 16, torch.bfloat16, sums=False),
        [relu_square(x), 2 * torch.relu(x) * randn(1, 70, 128, seed=7).bfloat16()],
    )
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=2e-2, atol=1e-6)
    nan = torch.full((1, 1, 64), float("nan")).bfloat16()
    assert low_square(nan, None, None, None, 16)[0].isnan().all()


@pytest.mark.parametrize("used", ([0], [1]))
def test_a_result_that_nobody_uses_counts_as_zeros(kernels, used):
    x, left, up, down = (t.requires_grad_() for t in case(32, 128, 70, "rows", "rows"))
    outs = low_square(x, left, up, down.t(), 32)
    grads = [randn(*out.shape, seed=i).bfloat16() * (i in used) for i, out in enumerate(outs)]
    expected = torch.autograd.grad(outs, (x, left, up), grads, retain_graph=True)
    found = torch.autograd.grad([outs[i] for i in used], (x, left, up), [grads[i] for i in used])
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("rank, width, dtype", [(48, 192, torch.bfloat16), (64, 96, torch.bfloat16), (64, 64, None)])
def test_shapes_that_no_kernel_has_take_plain_torch(kernels, rank, width, dtype):
    dtype = dtype or torch.float32
    assert not square.takes(dtype, width, rank)
    found = results(case(rank, width, 3, "repeated", "repeated"), rank, dtype)
    assert "LowSquare" not in type(found[0].grad_fn).__name__ and found[1].shape == (3, rank)


@pytest.mark.parametrize("order", shim.ORDERS[1:])
def test_the_order_of_threads_changes_no_bit(kernels, order, monkeypatch):
    monkeypatch.setattr(gpu_lerp, "MOST_GROUPS", 2)
    cases = [
        (rank, case(rank, 256, 70, before, after))
        for rank, before, after in ((64, "rows", "repeated"), (128, "repeated", "columns"), (16, "columns", "rows"))
    ]

    def all_results():
        return [x for rank, inputs in cases for x in results(inputs, rank, torch.bfloat16)]

    expected = all_results()
    kernels.set_order(order)
    assert all(map(torch.equal, all_results(), expected))


@pytest.mark.parametrize("method, mode", [("bone", "bone"), ("lora", "bat-in")])
def test_a_feed_forward_with_adapters(kernels, method, mode):
    """Result and all gradients in bfloat16, at most twice as far from float64 as with the adapters by themselves."""
    linear = nn.ModuleDict({"key": nn.Linear(64, 192, bias=False), "value": nn.Linear(192, 64, bias=False)})
    inject(linear, AdapterConfig(method=method, mode=mode, rank=16, alpha=8.0, targets=("key", "value")))
    with torch.no_grad():
        for i, parameter in enumerate(linear.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i) / parameter.shape[-1] ** 0.5)

    def run(dtype, around):
        names, layers = [], copy.deepcopy(linear).bfloat16().to(dtype)
        x = randn(1, 70, 64).bfloat16().to(dtype).requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(square, "call", lambda name, *rest, **sizes: (names.append(name), call(name, *rest, **sizes)))
            if not around:
                patch.setattr(square, "takes", lambda *_: False)
            y, _ = feed_forward(layers["key"], layers["value"], Input(x))
            y.backward(randn(*y.shape, seed=7).bfloat16().to(dtype))
        assert [name for name in names if "square" in name] == (["square_forward", "square_backward"] if around else [])
        return [y, x.grad, *(p.grad for p in layers.parameters() if p.requires_grad)]

    call = functions.call
    found, plain, true = run(torch.bfloat16, True), run(torch.bfloat16, False), run(torch.float64, False)
    for x, low, exact in zip(found, plain, true, strict=True):
        assert (x.double() - exact).norm() <= 2 * (low.double() - exact).norm()
