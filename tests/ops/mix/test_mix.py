"""The mix operations on a CPU: threads, what is kept, strides, dtypes and torch's contract."""

import pytest
import torch

from ops.mix.cases import assert_as_accurate, bonus_gate, keys_inputs, low_rank, randn, reads_inputs, run
from rwkv_peft.ops import mix
from rwkv_peft.ops.mix import delta_keys, lerp, norm_bonus_gate, norm_gate, relu_square, sigmoid_gate, value_residual
from rwkv_peft.ops.native import cpu

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def needs_a_compiler():
    if mix.cpu.FAMILY.unavailable():
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize("split", (1, 8, 18))
def test_a_sequence_in_two_parts_equals_the_whole(split):
    x, maa, (low, up) = randn(2, 19, 24), randn(5, 24), low_rank(2, 19, 24, 5, 4)
    whole = lerp(x, None, maa, low, up)
    first = lerp(x[:, :split], None, maa, low[:, :split], up)
    second = lerp(x[:, split:], x[:, split - 1], maa, low[:, split:], up)
    for a, b, c in zip(whole, first, second):
        torch.testing.assert_close(a, torch.cat([b, c], 1), rtol=1e-6, atol=1e-6)


THREADED = {  # function, inputs, which results add up over all tokens
    "lerp": (lerp, [randn(2, 150, 130), randn(2, 130), randn(2, 130), None, None], (4,)),
    "lerp of low rank": (lerp, [randn(2, 150, 130), *[randn(2, 130)] * 2, *low_rank(2, 150, 130, 2, 5)], (4, 6)),
    "delta_keys": (delta_keys, keys_inputs(2, 150, 2, 64), (5, 6, 7)),
    "norm_bonus_gate": (bonus_gate, reads_inputs(2, 150, 2, 64), (6, 7, 8)),
    "value_residual": (value_residual, [randn(2, 150, 130)] * 3 + [randn(1, 1, 130)], (4,)),
}


@pytest.mark.parametrize("threads", (2, 3))
@pytest.mark.parametrize("name", THREADED)
def test_threads_change_nothing_but_the_order_of_sums(name, threads, monkeypatch):
    function, inputs, sums = THREADED[name]
    one = run(function, inputs, torch.float32, False, monkeypatch)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        several = run(function, inputs, torch.float32, False, monkeypatch)
    finally:
        torch.set_num_threads(before)
    for i, (a, b) in enumerate(zip(one, several)):
        if i in sums:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        else:  # tiles of rows begin elsewhere, and their last rows are computed one by one
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.fixture
def portable(monkeypatch):
    """The kernels without any of this processor's extensions."""
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "best_level", lambda: "portable")
        mix.cpu.FAMILY.library.cache_clear()
        yield
    mix.cpu.FAMILY.library.cache_clear()


def test_any_processor_computes_the_same(portable, monkeypatch):
    for dtype in DTYPES:
        assert_as_accurate(delta_keys, keys_inputs(2, 9, 3, 20), dtype, monkeypatch)
        assert_as_accurate(bonus_gate, reads_inputs(2, 9, 3, 20), dtype, monkeypatch)
        inputs = [randn(2, 9, 33, seed=seed) for seed in range(3)] + [randn(1, 1, 33)]
        assert_as_accurate(value_residual, inputs, dtype, monkeypatch)
        assert_as_accurate(lerp, [randn(2, 9, 33), None, randn(6, 33)], dtype, monkeypatch)


def test_relu_square_keeps_its_result_alone():
    out = relu_square(randn(2, 3).requires_grad_())
    assert [x.data_ptr() for x in out.grad_fn.saved_tensors] == [out.data_ptr()]


def test_frozen_inputs_get_no_gradient():
    x, maa, (low, up) = randn(1, 6, 8).requires_grad_(), randn(2, 8), low_rank(1, 6, 8, 2, 4)
    torch.stack(lerp(x, None, maa, low, up)).sum().backward()
    assert x.grad is not None and maa.grad is None and low.grad is None and up.grad is None
    y, g = randn(1, 6, 2, 4), randn(1, 6, 8).requires_grad_()
    norm_gate(y, g, randn(8), randn(8), 1e-5).sum().backward()
    assert g.grad is not None
    k, low, *parameters = keys_inputs(1, 6, 2, 4)
    torch.stack(delta_keys(k.requires_grad_(), low, *parameters)).sum().backward()
    assert k.grad is not None and all(x.grad is None for x in (low, *parameters))


def test_an_unused_output_counts_as_zero(monkeypatch):
    inputs = [randn(2, 5, 8), randn(2, 8), randn(3, 8)]
    results = [run(lambda *x: lerp(*x)[1], inputs, torch.float32, plain, monkeypatch) for plain in (True, False)]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_strided_tensors_are_taken_as_they_are():
    x, grads = randn(5, 8, 3).transpose(0, 2), [randn(5, 8, 3, seed=i).transpose(0, 2) for i in range(2)]
    gradients = []
    for leaf in (x.requires_grad_(), x.detach().contiguous().requires_grad_()):
        torch.autograd.backward(lerp(leaf, None, randn(2, 5)), grads)
        gradients.append(leaf.grad)
    assert not x.is_contiguous() and torch.equal(*gradients)


def test_mixed_dtypes_take_the_plain_form():
    out = sigmoid_gate(randn(3, 4), randn(3, 4).bfloat16())
    assert out.dtype == torch.float32


def test_gradcheck_of_the_plain_forms():
    double = lambda *shape: randn(*shape).double().requires_grad_()  # noqa: E731
    packed = lambda x, last, maa: lerp(x, last, maa, None, None, torch.tensor([0, 2, 5]))  # noqa: E731
    check = torch.autograd.gradcheck
    assert check(lerp, (double(2, 3, 4), double(2, 4), double(2, 4), double(2, 3, 6), double(2, 3, 4)))
    assert check(packed, (double(1, 5, 4), double(2, 4), double(2, 4)))
    assert check(lambda *x: norm_gate(*x, 1e-3), (double(1, 3, 2, 4), double(1, 3, 8), double(8), double(8)))
    leaves = [x.double().requires_grad_() for x in reads_inputs(1, 3, 2, 4)]
    assert check(lambda *x: norm_bonus_gate(*x[:5], x[5:], 1e-3), leaves)
    assert check(delta_keys, [x.double().requires_grad_() for x in keys_inputs(1, 3, 2, 4)])
    assert check(value_residual, [*(double(1, 3, 4) for _ in range(3)), double(1, 1, 4)])


def test_a_second_derivative_is_refused():
    x = randn(2, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative.*float64"):
        torch.autograd.grad(relu_square(x).sum(), x, create_graph=True)


def test_a_shift_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"shift is \(2, 8\).*\(3, 8\)"):
        lerp(randn(3, 5, 8), randn(2, 8), randn(1, 8))


@pytest.mark.parametrize("low, up", [(randn(3, 5, 4), None), (None, randn(1, 4, 8)), (randn(3, 5, 6), randn(2, 4, 8))])
def test_factors_that_do_not_fit_are_refused(low, up):
    with pytest.raises(ValueError, match=r"low and up must be \(B, T, m K\) and \(m, K, C\)"):
        lerp(randn(3, 5, 8), None, randn(2, 8), low, up)


def test_one_compiled_graph():
    x, maa = randn(2, 5, 8), randn(2, 8)
    results = []
    for function in (lerp, torch.compile(lerp, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        outs = function(leaf, None, maa)
        sum(out.square().sum() for out in outs).backward()
        results.append([*outs, leaf.grad])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_without_a_compiler_the_plain_form_serves(monkeypatch):
    monkeypatch.setattr(mix.cpu.FAMILY, "unavailable", lambda: "no compiler")
    assert type(mix.relu_square(randn(2, 3).requires_grad_()).grad_fn).__name__ == "PowBackward0"
