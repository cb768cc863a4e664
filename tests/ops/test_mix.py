"""The mix operations: the CPU's kernels, and a GPU's on tests/cuda_shim, against the float64 plain form, with every
gradient, packing and states; threads, memory, strides, dtypes and torch's contract; launches."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from cuda_shim.shim import ORDERS, built, mix_call, record
from rwkv_peft.ops import mix
from rwkv_peft.ops.mix import (
    cpu,
    cuda,
    delta_keys,
    functions,
    lerp,
    norm_bonus_gate,
    norm_gate,
    relu_square,
    sigmoid_gate,
    value_residual,
)
from rwkv_peft.ops.native import cpu as levels

DTYPES = (torch.float32, torch.bfloat16)
HEADS = [(1, 1, 1, 4), (2, 9, 3, 8), (1, 70, 2, 64), (2, 33, 5, 20)]
KERNELS = (*"CpuLerp GpuLerp NormGate SigmoidGate ReluSquare".split(), *"DeltaKeys ValueResidual NormBonusGate".split())


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def run(function, inputs, dtype, plain, monkeypatch):
    """Outputs and the gradients of all inputs, in dtype, with kernels or without."""
    with monkeypatch.context() as patch:
        if plain:
            patch.setattr(cpu.FAMILY, "unavailable", lambda: "no compiler")
        leaves = [
            None if x is None else x.to(dtype).requires_grad_()
            for x in (None if x is None else x.clone() for x in inputs)
        ]
        outs = function(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        by_kernel = type(outs[0].grad_fn).__name__.removesuffix("Backward") in KERNELS
        assert by_kernel == (not plain and dtype != torch.float64)
        torch.autograd.backward(outs, [randn(*out.shape, seed=7 + i).to(dtype) for i, out in enumerate(outs)])
    return [*outs, *(x.grad for x in leaves if x is not None)]


def assert_as_accurate(function, inputs, dtype, monkeypatch):
    """Each result is at most twice as far from float64 as plain torch in the same dtype, plus two roundings."""
    rounded = [None if x is None else x.to(dtype) for x in inputs]
    truth = run(function, [None if x is None else x.double() for x in rounded], torch.float64, True, monkeypatch)
    plain = run(function, rounded, dtype, True, monkeypatch)
    kernel = run(function, rounded, dtype, False, monkeypatch)
    for i, (x, low, exact) in enumerate(zip(kernel, plain, truth, strict=True)):
        assert x.dtype == dtype and x.shape == exact.shape
        allowed = 2 * (low.double() - exact).norm() + 2 * torch.finfo(dtype).eps * exact.norm()
        assert (x.double() - exact).norm() <= allowed, i


def low_rank(B, T, C, m, rank):
    """Low-rank factors that make the weights depend on the token, or none."""
    return (None, None) if rank is None else (randn(B, T, m * rank), randn(m, rank, C) / rank)


def keys_inputs(B, T, H, N):
    """Arguments of delta_keys."""
    k, low = randn(B, T, H, N), 2 * randn(B, T, H, N, seed=1)
    return [k, low, *(randn(1, 1, H * N, seed=seed) for seed in (2, 3, 4))]


def reads_inputs(B, T, H, N):
    """Arguments of norm_bonus_gate, without eps."""
    y, r, k, v = (randn(B, T, H, N, seed=seed) + 0.5 for seed in range(4))
    weight, bias = randn(H * N, seed=6), randn(H * N, seed=7)
    return [y, r, k, v, randn(B, T, H * N, seed=4), randn(H, N, seed=5), weight, bias]


def bonus_gate(*inputs):
    """norm_bonus_gate of reads_inputs."""
    return norm_bonus_gate(*inputs[:5], inputs[5:], 64e-5)


@pytest.fixture(autouse=True)
def needs_a_compiler():
    if cpu.FAMILY.unavailable():
        pytest.skip("no C++ compiler")


@pytest.fixture
def on_shim(monkeypatch):
    """Send the operations' CPU tensors through the CUDA kernels; tensors that these should fill begin as NaN."""
    kernels = built(cuda.FAMILY)
    monkeypatch.setattr(cuda.FAMILY, "kernels", lambda device: kernels)
    monkeypatch.setattr(cpu, "call", mix_call)
    monkeypatch.setattr(functions, "CpuLerp", functions.GpuLerp)
    return kernels


# Whose kernels, and what they take.
WAYS = [("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16)]
# B, T, C, m; the shim is slow
LERPS = {
    "cpu": ((1, 1, 4, 1), (2, 7, 33, 2), (3, 5, 300, 6), (1, 130, 257, 5)),
    "cuda": ((1, 1, 4, 1), (2, 7, 34, 2), (3, 45, 132, 6)),
}
ELEMENTS = {"cpu": ((1, 1, 3), (2, 7, 33), (3, 50, 257)), "cuda": ((1, 1, 2), (2, 7, 34), (1, 50, 258))}


@pytest.fixture(params=("cpu", "cuda"))
def where(request):
    """Whose kernels compute."""
    if request.param == "cuda":
        request.getfixturevalue("on_shim")
    return request.param


@pytest.mark.parametrize(
    "where, dtype, sizes", [(*way, sizes) for way in WAYS for sizes in LERPS[way[0]]], indirect=["where"], ids=str
)
@pytest.mark.parametrize("with_last, rank", [(False, None), (True, 4), (True, None), (False, 7)])
def test_lerp(where, sizes, with_last, rank, dtype, monkeypatch):
    B, T, C, m = sizes
    inputs = [randn(B, T, C), randn(B, C) if with_last else None, randn(m, C), *low_rank(B, T, C, m, rank)]
    assert_as_accurate(lerp, inputs, dtype, monkeypatch)


@pytest.mark.parametrize("where, dtype", WAYS, indirect=["where"])
@pytest.mark.parametrize("with_last", (False, True))
def test_packed_lerp(where, with_last, dtype, monkeypatch):
    T = {"cpu": 131, "cuda": 101}[where]
    bounds = torch.tensor([0, 1, 5, 6, 64, T], dtype=torch.int32)
    inputs = [randn(1, T, 40), randn(5, 40) if with_last else None, randn(5, 40), *low_rank(1, T, 40, 5, 8)]
    assert_as_accurate(lambda *x: lerp(*x, bounds), inputs, dtype, monkeypatch)


@pytest.mark.parametrize("where, dtype", WAYS, indirect=["where"])
@pytest.mark.parametrize("B, T, H, N", [*HEADS, (1, 3, 1, 128)])
def test_heads(where, B, T, H, N, dtype, monkeypatch):
    inputs = [randn(B, T, H, N) + 0.5, 3 * randn(B, T, H * N), randn(H * N, seed=1), randn(H * N, seed=2)]
    assert_as_accurate(lambda *x: norm_gate(*x, 64e-5), inputs, dtype, monkeypatch)
    assert_as_accurate(delta_keys, keys_inputs(B, T, H, N), dtype, monkeypatch)
    assert_as_accurate(bonus_gate, reads_inputs(B, T, H, N), dtype, monkeypatch)


@pytest.mark.parametrize(
    "where, dtype, shape", [(*way, shape) for way in WAYS for shape in ELEMENTS[way[0]]], indirect=["where"], ids=str
)
def test_elements(where, shape, dtype, monkeypatch):
    assert_as_accurate(relu_square, [randn(*shape)], dtype, monkeypatch)
    assert_as_accurate(sigmoid_gate, [4 * randn(*shape), randn(*shape, seed=1)], dtype, monkeypatch)
    inputs = [randn(*shape), randn(*shape, seed=1), 2 * randn(*shape, seed=2), randn(1, 1, shape[-1])]
    assert_as_accurate(value_residual, inputs, dtype, monkeypatch)


@pytest.mark.parametrize("where, dtype", WAYS, indirect=["where"])
def test_keys_of_no_length_are_divided_by_the_least_one(where, dtype, monkeypatch):
    """A head of zeros has a finite gradient, and so does one of almost zeros."""
    k, *others = keys_inputs(1, 3, 2, 12)
    k[0, 1, 0], k[0, 2] = 0, 1e-14 * k[0, 2]
    assert_as_accurate(delta_keys, [k, *others], dtype, monkeypatch)
    assert all(x.isfinite().all() for x in run(delta_keys, [k, *others], dtype, False, monkeypatch))


@pytest.mark.parametrize("where, dtype", WAYS, indirect=["where"])
def test_extreme_gates_are_finite_and_nan_comes_through(where, dtype):
    r = torch.tensor([[-1e30, -100.0, 0.0, 100.0, 1e30, float("nan")]], dtype=dtype)
    expected = torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0, float("nan")]], dtype=dtype)
    out = sigmoid_gate(r, torch.ones(1, 6, dtype=dtype))
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=0, atol=1e-30)
    squares = relu_square(torch.tensor([[float("-inf"), -1.0, 2.0, float("nan")]], dtype=dtype))
    assert squares[0, :3].tolist() == [0, 0, 4] and squares[0, 3].isnan()


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
        patch.setattr(levels, "best_level", lambda: "portable")
        cpu.FAMILY.library.cache_clear()
        yield
    cpu.FAMILY.library.cache_clear()


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
    monkeypatch.setattr(cpu.FAMILY, "unavailable", lambda: "no compiler")
    assert type(mix.relu_square(randn(2, 3).requires_grad_()).grad_fn).__name__ == "PowBackward0"


def frozen_lerp(inputs, dtype, bounds):
    """A lerp's points, and the gradients that its kernels with the product inside give: those of x, last and low."""
    wanted = [x is not None and i in (0, 1, 3) for i, x in enumerate(inputs)]
    leaves = [x if x is None else x.to(dtype, copy=True).requires_grad_(w) for x, w in zip(inputs, wanted)]
    outs = lerp(*leaves, bounds)
    torch.autograd.backward(outs, [randn(*out.shape, seed=7 + i).to(dtype) for i, out in enumerate(outs)])
    return [*outs, *(x.grad for x, w in zip(leaves, wanted) if w)]


@pytest.mark.parametrize("rank, lengths", [(32, None), (64, None), (32, (1, 62, 1, 1, 65)), (64, (64, 63))])
@pytest.mark.parametrize("with_last, groups", [(False, 1), (True, 3)])
def test_lerp_with_its_product_inside(on_shim, rank, lengths, with_last, groups, monkeypatch):
    """Rows and sequences end inside a tile of tokens, at its end and after it; channels in one group and in several."""
    monkeypatch.setattr(functions, "MOST_GROUPS", groups)
    names, call = [], functions.call
    monkeypatch.setattr(
        functions, "call", lambda name, *rest, **sizes: (names.append(name), call(name, *rest, **sizes))
    )
    B, T, bounds = 2, 65, None
    if lengths is not None:
        B, T, bounds = 1, sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    last = randn(B if bounds is None else len(lengths), 192) if with_last else None
    inputs = [randn(B, T, 192), last, randn(5, 192), *low_rank(B, T, 192, 5, rank)]
    inputs = [x if x is None else x.bfloat16() for x in inputs]
    found = frozen_lerp(inputs, torch.bfloat16, bounds)
    assert names == ["lerp_low_forward", "lerp_low_backward"]
    true = frozen_lerp(inputs, torch.float64, bounds)
    monkeypatch.setattr(mix, "has_kernel", lambda *_: False)
    plain = frozen_lerp(inputs, torch.bfloat16, bounds)
    for i, (x, low, exact) in enumerate(zip(found, plain, true, strict=True)):
        assert (x.double() - exact).norm() <= 2 * (low.double() - exact).norm(), i


@pytest.mark.parametrize("order", ORDERS[1:])
def test_the_order_of_threads_changes_no_bit_of_a_lerp_with_its_product(on_shim, order):
    inputs = [randn(1, 70, 64), randn(1, 64), randn(5, 64), *low_rank(1, 70, 64, 5, 64)]
    inputs = [x.bfloat16() for x in inputs]

    expected = frozen_lerp(inputs, torch.bfloat16, None)
    on_shim.set_order(order)
    assert all(torch.equal(x, y) for x, y in zip(frozen_lerp(inputs, torch.bfloat16, None), expected, strict=True))


@pytest.mark.parametrize("kernel", (True, False), ids=("kernels", "plain"))
def test_empty_sequences_at_the_end_change_nothing_of_the_others(on_shim, kernel, monkeypatch):
    """The others' tokens are mixed with the same predecessors. The last token of an empty sequence is not defined."""
    monkeypatch.setattr(mix, "has_kernel", mix.has_kernel if kernel else lambda *_: False)
    bounds = torch.tensor([0, 1, 63, 64, 65, 130])
    raised = torch.cat([bounds, torch.tensor([130, 130, 130])])
    x, maa, (low, up) = randn(1, 130, 64), randn(5, 64), low_rank(1, 130, 64, 5, 32)
    x, maa, low, up = (tensor.bfloat16() for tensor in (x, maa, low, up))
    for factors in ((None, None), (low, up)):
        results = []
        for of in (bounds, raised):
            points = lerp(leaf := x.clone().requires_grad_(), None, maa, *factors, of)
            torch.autograd.backward(points, [randn(1, 130, 64, seed=i).bfloat16() for i in range(len(points))])
            results.append([*points, leaf.grad])
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("order", ORDERS[1:])
def test_the_order_of_threads_changes_no_bit(on_shim, order, monkeypatch):
    """With more tokens than one strip has, so that sums over strips are added up, too."""
    inputs = reads_inputs(1, 70, 2, 20)
    points = [randn(1, 70, 36), randn(1, 36), randn(6, 36), *low_rank(1, 70, 36, 6, 4)]

    def results():
        both = ((bonus_gate, inputs), (lerp, points))
        return [x for function, given in both for x in run(function, given, torch.bfloat16, False, monkeypatch)]

    expected = results()
    on_shim.set_order(order)
    assert all(torch.equal(x, y) for x, y in zip(results(), expected, strict=True))


def test_frozen_parameters_have_no_sums(on_shim, monkeypatch):
    wanted = []
    call = cpu.call
    monkeypatch.setattr(cpu, "call", lambda *rest, **sizes: (wanted.append(rest[2]), call(*rest, **sizes)))
    y, r, k, v, g, *parameters = (x.bfloat16() for x in reads_inputs(1, 5, 2, 4))
    norm_bonus_gate(y.requires_grad_(), r, k, v, g, parameters, 64e-5).sum().backward()
    assert y.grad is not None and not wanted[-1].keys() & {"gr_k", "gweight", "gbias"}


def test_each_kernel_has_its_layout():
    source = (Path(cuda.__file__).parents[2] / "cuda" / cuda.FAMILY.source).read_text(encoding="utf-8")
    assert re.findall(r"^MIX_OPERATION\((\w+),", source, re.MULTILINE) == list(cuda.LAYOUTS)
    for layout in {**cuda.LAYOUTS, **cuda.TILED}.values():
        sizes = [len(names) for names in layout]
        limits = [kind._length_ for _, kind in cuda.MixArguments._fields_ if issubclass(kind, ctypes.Array)]
        assert all(size <= limit for size, limit in zip(sizes, limits, strict=True))


def test_the_driver_is_asked_for_a_block_a_group_and_strip(monkeypatch):
    recorder, x = record(cuda.FAMILY, monkeypatch), randn(70, 300).bfloat16()
    cuda.call("relu_square_forward", x, dict(x=x, out=torch.empty_like(x)), tokens=70, channels=300)
    ((sizes, stream, arguments, extra),) = recorder.launches
    assert sizes == [3 * 3, 1, 1, recorder.constant, 1, 1, recorder.constant] and stream == 7 and extra is None
    assert (arguments.tokens, arguments.channels, arguments.size, arguments.strip) == (70, 300, 128, 32)
    assert arguments.inputs[0] == x.data_ptr() and arguments.inputs[1] is None
