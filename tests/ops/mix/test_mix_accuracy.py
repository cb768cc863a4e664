"""The mix operations: the CPU's kernels, and a GPU's on tests/cuda_shim, against the float64 plain form: every
gradient, packing and states."""

import pytest
import torch

from ops.mix.cases import HEADS, assert_as_accurate, bonus_gate, keys_inputs, low_rank, randn, reads_inputs, run
from rwkv_peft.ops.mix import cpu, delta_keys, lerp, norm_gate, relu_square, sigmoid_gate, value_residual

DTYPES = (torch.float32, torch.bfloat16)
# B, T, C, m; the shim is slow
LERPS = [("cpu", sizes) for sizes in ((1, 1, 4, 1), (2, 7, 33, 2), (3, 5, 300, 6), (1, 130, 257, 5))]
LERPS += [("cuda", sizes) for sizes in ((1, 1, 4, 1), (2, 7, 34, 2), (3, 45, 132, 6))]
ELEMENTS = [("cpu", shape) for shape in ((1, 1, 3), (2, 7, 33), (3, 50, 257))]
ELEMENTS += [("cuda", shape) for shape in ((1, 1, 2), (2, 7, 34), (1, 50, 258))]


@pytest.fixture(params=("cpu", "cuda"))
def where(request):
    """Whose kernels compute."""
    if request.param == "cuda":
        request.getfixturevalue("on_shim")
    elif cpu.FAMILY.unavailable():
        pytest.skip("no C++ compiler")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where, sizes", LERPS, indirect=["where"], ids=str)
@pytest.mark.parametrize("with_last, rank", [(False, None), (True, 4), (True, None), (False, 7)])
def test_lerp(where, sizes, with_last, rank, dtype, monkeypatch):
    B, T, C, m = sizes
    inputs = [randn(B, T, C), randn(B, C) if with_last else None, randn(m, C), *low_rank(B, T, C, m, rank)]
    assert_as_accurate(lerp, inputs, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_last", (False, True))
def test_packed_lerp(where, with_last, dtype, monkeypatch):
    T = {"cpu": 131, "cuda": 101}[where]
    bounds = torch.tensor([0, 1, 5, 6, 64, T], dtype=torch.int32)
    inputs = [randn(1, T, 40), randn(5, 40) if with_last else None, randn(5, 40), *low_rank(1, T, 40, 5, 8)]
    assert_as_accurate(lambda *x: lerp(*x, bounds), inputs, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, H, N", [*HEADS, (1, 3, 1, 128)])
def test_heads(where, B, T, H, N, dtype, monkeypatch):
    inputs = [randn(B, T, H, N) + 0.5, 3 * randn(B, T, H * N), randn(H * N, seed=1), randn(H * N, seed=2)]
    assert_as_accurate(lambda *x: norm_gate(*x, 64e-5), inputs, dtype, monkeypatch)
    assert_as_accurate(delta_keys, keys_inputs(B, T, H, N), dtype, monkeypatch)
    assert_as_accurate(bonus_gate, reads_inputs(B, T, H, N), dtype, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where, shape", ELEMENTS, indirect=["where"], ids=str)
def test_elements(where, shape, dtype, monkeypatch):
    assert_as_accurate(relu_square, [randn(*shape)], dtype, monkeypatch)
    assert_as_accurate(sigmoid_gate, [4 * randn(*shape), randn(*shape, seed=1)], dtype, monkeypatch)
    inputs = [randn(*shape), randn(*shape, seed=1), 2 * randn(*shape, seed=2), randn(1, 1, shape[-1])]
    assert_as_accurate(value_residual, inputs, dtype, monkeypatch)


def test_keys_of_no_length_are_divided_by_the_least_one(where, monkeypatch):
    """A head of zeros has a finite gradient, and so does one of almost zeros."""
    k, *others = keys_inputs(1, 3, 2, 12)
    k[0, 1, 0], k[0, 2] = 0, 1e-14 * k[0, 2]
    kernel, plain = (run(delta_keys, [k, *others], torch.float32, plain, monkeypatch) for plain in (False, True))
    for one, two in zip(kernel, plain):
        assert one.isfinite().all()
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_extreme_gates_are_finite_and_nan_comes_through(where):
    r = torch.tensor([[-1e30, -100.0, 0.0, 100.0, 1e30, float("nan")]])
    expected = torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0, float("nan")]])
    out = sigmoid_gate(r, torch.ones(1, 6))
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=0, atol=1e-30)
    squares = relu_square(torch.tensor([[float("-inf"), -1.0, 2.0, float("nan")]]))
    assert squares[0, :3].tolist() == [0, 0, 4] and squares[0, 3].isnan()
