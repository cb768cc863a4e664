"""The mix operations' CUDA kernels, run on the CPU through tests/cuda_shim: against the float64 plain form, every
gradient, packing and states; and under several orders of the threads."""

import ctypes
from pathlib import Path

import pytest
import torch

from cuda_shim import shim, toolchain
from ops.mix.cases import HEADS, assert_as_accurate, keys_inputs, low_rank, randn, reads_inputs
from ops.mix.cases import run as run_both
from rwkv_peft.ops.mix import (
    cuda,
    delta_keys,
    functions,
    gated_residual,
    gpu_lerp,
    layer_norm,
    lerp,
    norm_bonus_gate,
    norm_ddlerp,
    norm_gate,
    norm_lerp,
    norms,
    op,
    relu_square,
    sigmoid_gate,
    value_residual,
)
from rwkv_peft.ops.native import driver

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, C, m", [(1, 1, 4, 1), (2, 7, 34, 2), (3, 45, 132, 6)])
@pytest.mark.parametrize("with_last, rank", [(False, None), (True, 4), (True, None), (False, 7)])
def test_lerp(kernels, B, T, C, m, with_last, rank, dtype, monkeypatch):
    inputs = [randn(B, T, C), randn(B, C) if with_last else None, randn(m, C), *low_rank(B, T, C, m, rank)]
    assert_as_accurate(lerp, inputs, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_last", (False, True))
def test_packed_lerp(kernels, with_last, dtype, monkeypatch):
    bounds = torch.tensor([0, 1, 5, 6, 64, 101], dtype=torch.int32)
    inputs = [randn(1, 101, 40), randn(5, 40) if with_last else None, randn(5, 40), *low_rank(1, 101, 40, 5, 8)]
    assert_as_accurate(lambda *x: lerp(*x, bounds), inputs, dtype, monkeypatch)


def frozen_lerp(inputs, dtype, bounds):
    """A lerp's points and the gradients of what its kernels with the product inside give: x, last and low."""
    wanted = [x is not None and i in (0, 1, 3) for i, x in enumerate(inputs)]
    leaves = [x if x is None else x.to(dtype, copy=True).requires_grad_(w) for x, w in zip(inputs, wanted)]
    outs = lerp(*leaves, bounds)
    torch.autograd.backward(outs, [randn(*out.shape, seed=7 + i).to(dtype) for i, out in enumerate(outs)])
    return [*outs, *(x.grad for x, w in zip(leaves, wanted) if w)]


@pytest.mark.parametrize("rank, lengths", [(32, None), (64, None), (32, (1, 62, 1, 1, 65)), (64, (64, 63))])
@pytest.mark.parametrize("with_last, groups", [(False, 1), (True, 3)])
def test_lerp_with_its_product_inside(kernels, rank, lengths, with_last, groups, monkeypatch):
    """Rows and sequences that end in, at and after a tile of tokens; channels in one group and in several."""
    monkeypatch.setattr(gpu_lerp, "MOST_GROUPS", groups)
    names, call = [], functions.call
    monkeypatch.setattr(gpu_lerp, "call", lambda name, *rest, **sizes: (names.append(name), call(name, *rest, **sizes)))
    B, T, bounds = 2, 65, None
    if lengths is not None:
        B, T, bounds = 1, sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    last = randn(B if bounds is None else len(lengths), 192) if with_last else None
    inputs = [randn(B, T, 192), last, randn(5, 192), *low_rank(B, T, 192, 5, rank)]
    inputs = [x if x is None else x.bfloat16() for x in inputs]
    found = frozen_lerp(inputs, torch.bfloat16, bounds)
    assert names == ["lerp_low_forward", "lerp_low_backward"]
    true = frozen_lerp(inputs, torch.float64, bounds)
    monkeypatch.setattr(op, "fused", lambda *_: False)
    plain = frozen_lerp(inputs, torch.bfloat16, bounds)
    for i, (x, low, exact) in enumerate(zip(found, plain, true, strict=True)):
        assert (x.double() - exact).norm() <= 2 * (low.double() - exact).norm(), i


@pytest.mark.parametrize("order", shim.ORDERS[1:])
def test_the_order_of_threads_changes_no_bit_of_a_lerp_with_its_product(kernels, order):
    inputs = [randn(1, 70, 64), randn(1, 64), randn(5, 64), *low_rank(1, 70, 64, 5, 64)]
    inputs = [x.bfloat16() for x in inputs]

    def results():
        with_norm = ddlerp(ddlerp_inputs(1, 70, 64, 32, 1), torch.bfloat16)
        return [*frozen_lerp(inputs, torch.bfloat16, None), *with_norm]

    expected = results()
    kernels.set_order(order)
    assert all(torch.equal(x, y) for x, y in zip(results(), expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, H, N", [*HEADS, (1, 3, 1, 128)])
def test_heads(kernels, B, T, H, N, dtype, monkeypatch):
    inputs = [randn(B, T, H, N) + 0.5, 3 * randn(B, T, H * N), randn(H * N, seed=1), randn(H * N, seed=2)]
    assert_as_accurate(lambda *x: norm_gate(*x, 64e-5), inputs, dtype, monkeypatch)
    assert_as_accurate(delta_keys, keys_inputs(B, T, H, N), dtype, monkeypatch)
    assert_as_accurate(lambda *x: norm_bonus_gate(*x, 64e-5), reads_inputs(B, T, H, N), dtype, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, offset", [((1, 1, 2), 0), ((2, 7, 34), 0), ((1, 45, 520), 0), ((1, 3, 2080), 2)])
@pytest.mark.parametrize("trained", (False, True))
def test_layer_norm(kernels, shape, offset, trained, dtype, monkeypatch):
    """Of any width, from an address that is no multiple of 16 bytes too; the parameters frozen and trained."""
    C = shape[-1]
    whole = randn(randn(*shape).numel() + offset) + 0.5
    inputs = [x.to(dtype) for x in (whole, randn(C, seed=2), randn(C, seed=3))]

    def results(dtype, kernel):
        monkeypatch.setattr(op, "norms_fused", lambda *_: kernel)
        wanted = (True, trained, trained)
        leaves = [x.to(dtype, copy=True).requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)]
        again, out = layer_norm(leaves[0][offset:].view(shape), *leaves[1:], 1e-5)
        assert (type(out.grad_fn).__name__ == "LayerNormBackward") == kernel
        torch.autograd.backward([again, out], [randn(*shape, seed=seed).to(dtype) for seed in (7, 8)])
        return [again, out, *(x.grad for x, w in zip(leaves, wanted) if w)]

    found, plain, true = results(dtype, True), results(dtype, False), results(torch.float64, False)
    for i, (x, low, exact) in enumerate(zip(found, plain, true, strict=True)):
        assert x.dtype == dtype
        allowed = 2 * (low.double() - exact).norm() + 2 * torch.finfo(dtype).eps * exact.norm()
        assert (x.double() - exact).norm() <= allowed, i


def norm_and_lerp(inputs, dtype, bounds, whole, offset=0, twice=None):
    """Results of norm_lerp, and the gradients of x and last; x lies `offset` elements into its memory."""
    x, last, weight, bias, maa = (x if x is None else x.to(dtype, copy=True) for x in inputs)
    memory = torch.cat([x.new_zeros(offset), x.flatten()]).requires_grad_()
    leaves = [memory] if last is None else [memory, last.requires_grad_()]
    x = memory[offset:].view(x.shape)
    again, ends, points, _ = norm_lerp(x, weight, bias, 1e-5, last, maa, bounds, whole, twice)
    outs = [again, ends, *points]
    torch.autograd.backward(outs, [randn(*out.shape, seed=7 + i).to(dtype) for i, out in enumerate(outs)])
    return [*outs, *(x.grad for x in leaves)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, offset, lengths, with_last, points, whole, twice",
    [
        ((2, 9, 34), 0, None, True, 2, False, None),
        ((2, 9, 34), 0, None, False, 6, False, 3),
        ((1, 21, 520), 2, (1, 4, 1, 15), True, 2, True, 0),
        ((1, 21, 34), 0, (6, 15), False, 1, False, None),
        ((1, 6, 2080), 0, None, True, 1, True, None),
    ],
)
def test_norm_and_lerp_in_one(kernels, shape, offset, lengths, with_last, points, whole, twice, dtype, monkeypatch):
    """Sequences that begin and end within strips and with them; of any width and address; a point given twice."""
    monkeypatch.setattr(norms, "STRIPS", 4)
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    sequences = shape[0] if lengths is None else len(lengths)
    last = randn(sequences, shape[2], seed=2) if with_last else None
    inputs = [randn(*shape) + 0.5, last, *(randn(shape[2], seed=i) for i in (3, 4)), randn(points, shape[2])]
    inputs = [x if x is None else x.to(dtype) for x in inputs]
    found = norm_and_lerp(inputs, dtype, bounds, whole, offset, twice)
    assert "NormLerp" in type(found[1].grad_fn).__name__
    monkeypatch.setattr(op, "fused", lambda *_: False)
    plain, true = (norm_and_lerp(inputs, d, bounds, whole, offset, twice) for d in (dtype, torch.float64))
    for i, (x, low, exact) in enumerate(zip(found, plain, true, strict=True)):
        assert x.dtype == dtype
        allowed = 2 * (low.double() - exact).norm() + 2 * torch.finfo(dtype).eps * exact.norm()
        assert (x.double() - exact).norm() <= allowed, i


def ddlerp_inputs(B, T, C, rank, sequences=None, dtype=torch.bfloat16, decay_rank=0, gated=False):
    """What norm_ddlerp takes: x, y and gate or None, what precedes its sequences or None, and the parameters."""
    w1, decay_w1 = randn(C, 5 * rank) / C**0.5, randn(C, decay_rank or 2 * rank) / C**0.5
    parameters = [*randn(2, C), randn(1, C), w1, randn(5, C), randn(5, rank, C) / rank**0.5, decay_w1]
    residual = [randn(B, T, C, seed=1), 3 * randn(B, T, C, seed=2)] if gated else [None, None]
    inputs = [randn(B, T, C) + 0.5, *residual, None if sequences is None else randn(sequences, C), *parameters]
    return [x if x is None else x.to(dtype) for x in inputs]


def ddlerp(inputs, dtype, bounds=None, trained=None):
    """Results of norm_ddlerp, and the gradients of x, y, gate, last and input number `trained`."""
    wanted = [x is not None and (i < 4 or i == trained) for i, x in enumerate(inputs)]
    leaves = [x if x is None else x.to(dtype, copy=True).requires_grad_(w) for x, w in zip(inputs, wanted)]
    x, y, gate, last, weight, bias, *others = leaves
    total, ends, low, points, _ = norm_ddlerp(x, y, gate, weight, bias, 1e-5, last, *others, bounds)
    outs = [total, ends, low, *points]
    torch.autograd.backward(outs, [randn(*out.shape, seed=7 + i).to(dtype) for i, out in enumerate(outs)])
    return [*outs, *(x.grad for x, w in zip(leaves, wanted) if w)]


def takes_one_function(outs):
    return "NormDDLerp" in type(outs[2].grad_fn).__name__


@pytest.mark.parametrize("rank, lengths", [(32, None), (64, None), (32, (1, 62, 1, 1, 65)), (64, (64, 63))])
@pytest.mark.parametrize("with_last, gated, groups", [(False, True, 1), (True, False, 3)])
def test_norm_and_points_that_depend_on_the_token(kernels, rank, lengths, with_last, gated, groups, monkeypatch):
    """Rows and sequences that end in, at and after a tile of tokens; channels in one group and in several."""
    monkeypatch.setattr(gpu_lerp, "MOST_GROUPS", groups)
    monkeypatch.setattr(norms, "STRIPS", 4)
    B, T, bounds = 2, 65, None
    if lengths is not None:
        B, T, bounds = 1, sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    sequences = B if bounds is None else len(lengths)
    inputs = ddlerp_inputs(B, T, 160, rank, sequences if with_last else None, gated=gated)
    found = ddlerp(inputs, torch.bfloat16, bounds)
    assert takes_one_function(found)
    true = ddlerp(inputs, torch.float64, bounds)
    monkeypatch.setattr(op, "fused", lambda *_: False)
    plain = ddlerp(inputs, torch.bfloat16, bounds)
    for i, (x, low, exact) in enumerate(zip(found, plain, true, strict=True)):
        assert x.dtype == torch.bfloat16
        assert (x.double() - exact).norm() <= 2 * (low.double() - exact).norm(), i


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", (True, False), ids=("kernels", "plain"))
def test_empty_sequences_at_the_end_change_nothing_of_the_others(kernels, dtype, kernel, monkeypatch):
    """Which tokens are mixed with which; what an empty one's last token is, none of them says."""
    monkeypatch.setattr(op, "fused", op.fused if kernel else lambda *_: False)
    bounds = torch.tensor([0, 1, 63, 64, 65, 130])
    raised = torch.cat([bounds, torch.tensor([130, 130, 130])])
    x, weight, bias, maa, (low, up) = randn(1, 130, 64), *randn(2, 64), randn(5, 64), low_rank(1, 130, 64, 5, 32)
    x, weight, bias, maa, low, up = (tensor.to(dtype) for tensor in (x, weight, bias, maa, low, up))
    factors = ddlerp_inputs(1, 130, 64, 32, dtype=dtype)[6:]
    for function in (
        lambda x, bounds: lerp(x, None, maa, None, None, bounds),
        lambda x, bounds: lerp(x, None, maa, low, up, bounds),
        lambda x, bounds: norm_lerp(x, weight, bias, 1e-5, None, maa, bounds)[2],
        lambda x, bounds: norm_ddlerp(x, None, None, weight, bias, 1e-5, None, *factors, bounds)[3],
    ):
        results = []
        for of in (bounds, raised):
            points = function(leaf := x.clone().requires_grad_(), of)
            torch.autograd.backward(points, [randn(1, 130, 64, seed=i).to(dtype) for i in range(len(points))])
            results.append([*points, leaf.grad])
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("trained", range(4, 11))
def test_what_makes_points_takes_several_kernels_where_it_trains(kernels, trained):
    outs = ddlerp(ddlerp_inputs(1, 3, 64, 32, 1), torch.bfloat16, trained=trained)
    assert not takes_one_function(outs) and outs[-1].isfinite().all()


@pytest.mark.parametrize(
    "shape, dtype",
    [((80, 32), torch.bfloat16), ((64, 16), torch.bfloat16), ((64, 32), torch.float32), ((4160, 32), torch.bfloat16)],
)
def test_shapes_that_no_kernel_has_take_several(kernels, shape, dtype):
    assert not takes_one_function(ddlerp(ddlerp_inputs(1, 3, *shape, dtype=dtype), dtype))
    assert not takes_one_function(ddlerp(ddlerp_inputs(1, 3, 64, 32, decay_rank=32), torch.bfloat16))


def test_gradients_at_any_address_are_read_16_bytes_at_once(kernels, monkeypatch):
    read, call = {}, functions.call
    monkeypatch.setattr(op.ddlerp, "call", lambda *rest, **sizes: (read.update(rest[2]), call(*rest, **sizes)))
    x, _, _, _, weight, bias, *factors = ddlerp_inputs(1, 3, 64, 32)
    _, _, _, points, _ = norm_ddlerp(x.requires_grad_(), None, None, weight, bias, 1e-5, None, *factors)
    memory = randn(2 + 3 * 64).bfloat16()
    torch.autograd.backward(points, [memory[2:].view(1, 3, 64)] * 4)
    assert all(read[f"grad{i}"].data_ptr() % 16 == 0 for i in range(1, 5)) and x.grad.isfinite().all()


@pytest.mark.parametrize("used", ([0], [1], [2], [3, 4]))
@pytest.mark.parametrize("depends_on_the_token", (False, True))
def test_results_that_nobody_uses_count_as_zeros(kernels, depends_on_the_token, used):
    x, y, gate, _, weight, bias, maa_x, *factors = ddlerp_inputs(1, 5, 64, 32, gated=True)
    x.requires_grad_()
    if depends_on_the_token:
        *outs, points, _ = norm_ddlerp(x, y, gate, weight, bias, 1e-5, None, maa_x, *factors)
    else:
        *outs, points, _ = norm_lerp(x, weight, bias, 1e-5, None, factors[1])
    outs += points
    grads = [randn(*out.shape, seed=i).bfloat16() * (i in used) for i, out in enumerate(outs)]
    (expected,) = torch.autograd.grad(outs, x, grads, retain_graph=True)
    (found,) = torch.autograd.grad([outs[i] for i in used], x, [grads[i] for i in used])
    assert torch.equal(found, expected)


def test_trained_norms_and_points_take_two_kernels(kernels):
    x, (weight, bias), maa = randn(1, 5, 8), randn(2, 8), randn(2, 8).requires_grad_()
    _, _, points, _ = norm_lerp(x, weight, bias, 1e-5, None, maa)
    sum(point.sum() for point in points).backward()
    assert "NormLerp" not in type(points[0].grad_fn).__name__ and maa.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 7, 34), (1, 50, 258)])
def test_elements(kernels, shape, dtype, monkeypatch):
    assert_as_accurate(relu_square, [randn(*shape)], dtype, monkeypatch)
    assert_as_accurate(sigmoid_gate, [4 * randn(*shape), randn(*shape, seed=1)], dtype, monkeypatch)
    inputs = [randn(*shape, seed=2), 4 * randn(*shape), randn(*shape, seed=1)]
    assert_as_accurate(gated_residual, inputs, dtype, monkeypatch)
    inputs = [randn(*shape), randn(*shape, seed=1), 2 * randn(*shape, seed=2), randn(1, 1, shape[-1])]
    assert_as_accurate(value_residual, inputs, dtype, monkeypatch)


@pytest.mark.parametrize("used", [(0,), (1, 2), (2,)])
def test_values_of_which_not_all_are_used(kernels, used):
    """The values' gradients come from either user; `first` may have none but the next layer's, nor they any."""
    v, first, low, v0 = (x.requires_grad_() for x in (*randn(3, 1, 9, 6), randn(1, 1, 6)))
    grads = [randn(1, 9, 6, seed=i) for i in used]

    def gradients(outs):
        chosen = [outs[i] for i in used]
        return torch.autograd.grad(chosen, [v, first, low, v0], grads, allow_unused=True)

    expected = gradients((*2 * [v + (first - v) * torch.sigmoid(v0 + low)], first))
    for x, y in zip(gradients(value_residual(v, first, low, v0)), expected, strict=True):
        assert x is y is None or torch.allclose(x, y, atol=1e-5)


def test_keys_of_no_length_are_divided_by_the_least_one(kernels, monkeypatch):
    k, *others = keys_inputs(1, 3, 2, 12)
    k[0, 1, 0], k[0, 2] = 0, 1e-14 * k[0, 2]
    kernel, plain = (run_both(delta_keys, [k, *others], torch.float32, plain, monkeypatch) for plain in (False, True))
    for one, two in zip(kernel, plain):
        assert one.isfinite().all()
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_nan_comes_through(kernels):
    r = torch.tensor([[-1e30, -100.0, 0.0, 100.0, 1e30, float("nan")]])
    out = sigmoid_gate(r, torch.ones(1, 6))
    expected = torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0, float("nan")]])
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=0, atol=1e-30)
    assert relu_square(r)[0, -1].isnan()


@pytest.mark.parametrize("order", shim.ORDERS[1:])
def test_the_order_of_threads_changes_no_bit(kernels, order, monkeypatch):
    """Over more tokens than one strip has, so that sums over strips are added up, too."""
    function, inputs = (lambda *x: norm_bonus_gate(*x, 64e-5)), reads_inputs(1, 70, 2, 20)
    monkeypatch.setattr(op, "norms_fused", lambda *_: True)

    def whole_tokens():
        leaves = [x.requires_grad_() for x in (randn(1, 3, 300), randn(300), randn(300))]
        outs = layer_norm(*leaves, 1e-5)
        torch.autograd.backward(outs, [randn(1, 3, 300, seed=seed) for seed in (7, 8)])
        inputs = [randn(1, 9, 300), randn(1, 300), *randn(2, 300), randn(2, 300, seed=1)]
        mixed = norm_and_lerp(inputs, torch.float32, None, True)
        return [*outs, *(x.grad for x in leaves), *mixed]

    points = [randn(1, 70, 36), randn(1, 36), randn(6, 36), *low_rank(1, 70, 36, 6, 4)]
    expected = [
        *run_both(function, inputs, torch.float32, False, monkeypatch),
        *run_both(lerp, points, torch.float32, False, monkeypatch),
        *whole_tokens(),
    ]
    kernels.set_order(order)
    monkeypatch.setattr(norms, "STRIPS", 2)  # nor does a block's length
    found = [
        *run_both(function, inputs, torch.float32, False, monkeypatch),
        *run_both(lerp, points, torch.float32, False, monkeypatch),
        *whole_tokens(),
    ]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_frozen_parameters_have_no_sums(kernels, monkeypatch):
    wanted = []
    launch = cuda.launch
    monkeypatch.setattr(cuda, "launch", lambda *rest, **sizes: (wanted.append(rest[4]), launch(*rest, **sizes)))
    y, r, k, v, g, *parameters = reads_inputs(1, 5, 2, 4)
    norm_bonus_gate(y.requires_grad_(), r, k, v, g, *parameters, 64e-5).sum().backward()
    assert y.grad is not None and all(wanted[-1][name] is None for name in ("gr_k", "gweight", "gbias"))


def test_each_kernel_has_its_layout():
    source = (Path(cuda.__file__).parents[2] / "cuda" / cuda.FAMILY.source).read_text(encoding="utf-8")
    assert [
        line.split("(")[1].split(",")[0] for line in source.splitlines() if line.startswith("MIX_OPERATION(")
    ] == list(cuda.LAYOUTS)
    for layout in {**cuda.LAYOUTS, **cuda.TILED}.values():
        sizes = [len(names) for names in layout]
        limits = [kind._length_ for _, kind in cuda.MixArguments._fields_ if issubclass(kind, ctypes.Array)]
        assert all(size <= limit for size, limit in zip(sizes, limits, strict=True))


def test_the_driver_is_asked_for_a_block_a_group_and_strip(monkeypatch):
    recorder = toolchain.RecordingDriver(cuda.MixArguments)
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: recorder)
    x = randn(70, 300)
    module = cuda.FAMILY.module(b"image")
    cuda.launch(module, 7, "relu_square_forward", x, dict(x=x, out=torch.empty_like(x)), count=x.numel())
    ((sizes, stream, arguments, extra),) = recorder.launches
    assert sizes == [3 * 3, 1, 1, recorder.constant, 1, 1, recorder.constant] and stream == 7 and extra is None
    assert (arguments.tokens, arguments.channels, arguments.size, arguments.strip) == (70, 300, 128, 32)
    assert arguments.inputs[0] == x.data_ptr() and arguments.inputs[1] is None
