"""A lerp's points that bat-in's layers take bent: the CUDA kernels, run on the CPU through tests/cuda_shim, against the
float64 plain form, every gradient, packing and states; under several orders of the threads."""

import copy

import pytest
import torch

from cuda_shim import shim
from ops.mix.cases import randn
from ops.mix.test_mix_cuda import ddlerp_inputs
from rwkv_peft.adapters.inject import inject
from rwkv_peft.config import AdapterConfig
from rwkv_peft.models import family_named
from rwkv_peft.ops.mix import affine, bent, functions, gpu_lerp, norm_ddlerp, norm_lerp, op


def ddlerp(inputs, bones, dtype, bounds=None):
    """Results of norm_ddlerp with matrices that bend points, and the gradients of x, y, gate, last and matrices."""
    leaves = [x if x is None else x.to(dtype, copy=True).requires_grad_(i < 4) for i, x in enumerate(inputs)]
    matrices = [x if x is None else x.to(dtype, copy=True).requires_grad_() for x in bones]
    x, y, gate, last, weight, bias, *others = leaves
    *outs, points, shifts = norm_ddlerp(x, y, gate, weight, bias, 1e-5, last, *others, bounds, bones=matrices)
    points, shifts = (points, shifts) if shifts else bent(points, matrices)
    outs += [*points, *shifts]
    torch.autograd.backward(outs, [randn(*out.shape, seed=7 + i).to(dtype) for i, out in enumerate(outs)])
    return [*outs, *(x.grad for x in (*leaves[:4], *matrices) if x is not None)]


def matrices(C, rank, which=range(4)):
    return [randn(C // rank, rank, rank, seed=20 + i).bfloat16() / rank**0.5 if i in which else None for i in range(4)]


@pytest.mark.parametrize("low_rank, lengths", [(32, None), (64, None), (32, (1, 62, 1, 1, 65)), (64, (64, 63))])
@pytest.mark.parametrize(
    "rank, which, with_last, gated, groups",
    [(64, range(4), False, True, 1), (32, (0, 3), True, False, 3), (16, (2,), True, True, 8)],
)
def test_points_are_bent(kernels, low_rank, lengths, rank, which, with_last, gated, groups, monkeypatch):
    """Rows and sequences that end in, at and after a tile of tokens; channels and tokens in one block and in several;
    some points bent and some not."""
    monkeypatch.setattr(gpu_lerp, "MOST_GROUPS", groups)
    monkeypatch.setattr(affine, "BLOCKS", 12)
    names, call = [], functions.call
    monkeypatch.setattr(affine, "call", lambda name, *rest, **sizes: (names.append(name), call(name, *rest, **sizes)))
    B, T, bounds = 2, 65, None
    if lengths is not None:
        B, T, bounds = 1, sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    sequences = B if bounds is None else len(lengths)
    inputs = ddlerp_inputs(B, T, 192, low_rank, sequences if with_last else None, gated=gated)
    bones = matrices(192, rank, which)
    found = ddlerp(inputs, bones, torch.bfloat16, bounds)
    assert names == ["lerp_affine_forward", "lerp_affine_backward", "sum_parts"]
    true = ddlerp(inputs, bones, torch.float64, bounds)
    monkeypatch.setattr(op, "fused", lambda *_: False)
    plain = ddlerp(inputs, bones, torch.bfloat16, bounds)
    for i, (x, low, exact) in enumerate(zip(found, plain, true, strict=True)):
        assert x.shape == low.shape and x.dtype == torch.bfloat16
        assert (x.double() - exact).norm() <= 2 * (low.double() - exact).norm(), i


@pytest.mark.parametrize("order", shim.ORDERS[1:])
def test_the_order_of_threads_changes_no_bit(kernels, order):
    inputs, bones = ddlerp_inputs(1, 70, 128, 32, 1), matrices(128, 64)
    expected = ddlerp(inputs, bones, torch.bfloat16)
    kernels.set_order(order)
    assert all(torch.equal(x, y) for x, y in zip(ddlerp(inputs, bones, torch.bfloat16), expected, strict=True))


def mixed(inputs, bones, dtype, bounds=None, twice=None):
    """The same of norm_lerp: the gradients of x, last and matrices."""
    x, last, *parameters = (
        x if x is None else x.to(dtype, copy=True).requires_grad_(i < 2) for i, x in enumerate(inputs)
    )
    matrices = [x if x is None else x.to(dtype, copy=True).requires_grad_() for x in bones]
    weight, bias, maa = parameters
    *outs, points, shifts = norm_lerp(x, weight, bias, 1e-5, last, maa, bounds, twice=twice, bones=matrices)
    if not shifts:
        first, shifts = bent(points[: len(maa)], matrices)
        points = *first, *points[len(maa) :]
    outs += [*points, *shifts]
    torch.autograd.backward(outs, [randn(*out.shape, seed=7 + i).to(dtype) for i, out in enumerate(outs)])
    return [*outs, *(x.grad for x in (x, last, *matrices) if x is not None)]


@pytest.mark.parametrize("lengths", (None, (1, 62, 1, 1, 65)))
@pytest.mark.parametrize("rank, m, which, twice", [(64, 2, (0, 1), None), (32, 6, (0, 2), 3), (16, 1, (0,), None)])
def test_points_whose_weights_are_the_same_for_all_tokens(kernels, lengths, rank, m, which, twice, monkeypatch):
    monkeypatch.setattr(affine, "BLOCKS", 12)
    names, call = [], functions.call
    monkeypatch.setattr(affine, "call", lambda name, *rest, **sizes: (names.append(name), call(name, *rest, **sizes)))
    B, T, bounds = (2, 65, None) if lengths is None else (1, sum(lengths), torch.tensor([0, *lengths]).cumsum(0))
    last = randn(B if lengths is None else len(lengths), 192)
    inputs = [x.bfloat16() for x in (randn(B, T, 192) + 0.5, last, *randn(2, 192), randn(m, 192))]
    bones = [*matrices(192, rank, which), None, None][:m]
    found = mixed(inputs, bones, torch.bfloat16, bounds, twice)
    assert names == ["lerp_affine_forward", "lerp_affine_backward", "sum_parts"]
    true = mixed(inputs, bones, torch.float64, bounds, twice)
    monkeypatch.setattr(op, "fused", lambda *_: False)
    plain = mixed(inputs, bones, torch.bfloat16, bounds, twice)
    for i, (x, low, exact) in enumerate(zip(found, plain, true, strict=True)):
        assert x.shape == low.shape and x.dtype == torch.bfloat16
        assert (x.double() - exact).norm() <= 2 * (low.double() - exact).norm(), i


@pytest.mark.parametrize("used", ([2], [3], [4], [6], [7]))
def test_results_that_nobody_uses_count_as_zeros(kernels, used):
    """Of the decay's factor, points and shifts."""
    x, y, gate, _, weight, bias, *factors = ddlerp_inputs(1, 5, 64, 32, gated=True)
    leaves = x.requires_grad_(), *(matrix.requires_grad_() for matrix in matrices(64, 16))
    *outs, points, shifts = norm_ddlerp(x, y, gate, weight, bias, 1e-5, None, *factors, bones=leaves[1:])
    outs += [*points, *shifts]
    grads = [randn(*out.shape, seed=i).bfloat16() * (i in used) for i, out in enumerate(outs)]
    expected = torch.autograd.grad(outs, leaves, grads, retain_graph=True)
    found = torch.autograd.grad([outs[i] for i in used], leaves, [grads[i] for i in used])
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_tensors_at_any_address_are_read_16_bytes_at_once(kernels, monkeypatch):
    read, call = {}, functions.call
    monkeypatch.setattr(affine, "call", lambda *rest, **sizes: (read.update(rest[2]), call(*rest, **sizes)))
    memory = randn(2 + 3 * 64).bfloat16()
    x, weight, bias, maa = memory[2:].view(1, 3, 64), *randn(2, 64).bfloat16(), randn(1, 64).bfloat16()
    bone = randn(2 + 64 * 16).bfloat16()[2:].view(4, 16, 16).requires_grad_()
    _, _, points, shifts = norm_lerp(x, weight, bias, 1e-5, None, maa, bones=[bone])
    torch.autograd.backward([*points, *shifts], [x, randn(2 + 48).bfloat16()[2:].view(3, 16)])
    for name in ("x", "bone0", "grad0", "gshift0"):
        assert read[name].data_ptr() % 16 == 0, name
    assert bone.grad.isfinite().all()


def test_frozen_matrices_have_no_gradient(kernels, monkeypatch):
    names, call = [], functions.call
    monkeypatch.setattr(affine, "call", lambda name, *rest, **sizes: (names.append(name), call(name, *rest, **sizes)))
    inputs, bones = ddlerp_inputs(1, 70, 64, 32), matrices(64, 16)
    x, _, _, _, weight, bias, *factors = inputs
    results = []
    for trained in (False, True):
        leaf, given = x.clone().requires_grad_(), [bone.clone().requires_grad_(trained) for bone in bones]
        *_, points, shifts = norm_ddlerp(leaf, None, None, weight, bias, 1e-5, None, *factors, bones=given)
        torch.autograd.backward([*points, *shifts], [torch.ones_like(out) for out in (*points, *shifts)])
        assert all((bone.grad is not None) == trained for bone in given)
        results.append(leaf.grad)
    assert torch.equal(*results) and names.count("sum_parts") == 1


def test_an_input_without_gradient_gives_none_to_points_that_stay_as_they_are(kernels):
    """The first block's, where the embedding is frozen."""
    x, y, gate, _, weight, bias, *factors = ddlerp_inputs(1, 70, 64, 32)
    bones = [bone if bone is None else bone.requires_grad_() for bone in matrices(64, 16, (0, 2))]
    results = []
    for needed in (False, True):
        leaf = x.clone().requires_grad_(needed)
        *_, decay, points, shifts = norm_ddlerp(leaf, y, gate, weight, bias, 1e-5, None, *factors, bones=bones)
        assert [out.requires_grad for out in (decay, *points)] == [needed, True, needed, True, needed]
        *again, mixed, more = norm_lerp(leaf, weight, bias, 1e-5, None, factors[2], bones=[None, bones[0], *3 * [None]])
        assert [out.requires_grad for out in (*again, *mixed)] == [needed, needed, needed, True, *3 * [needed]]
        outs = [points[0], points[2], mixed[1], *shifts, *more]
        results.append(torch.autograd.grad(outs, [bones[0], bones[2]], [torch.ones_like(out) for out in outs]))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize(
    "C, ranks, dtype",
    [
        (96, (32, 32), torch.bfloat16),
        (64, (32, 16), torch.bfloat16),
        (128, (128, 128), torch.bfloat16),
        (64, (32, 32), torch.float32),
    ],
)
def test_shapes_that_no_kernel_has_are_not_bent(kernels, C, ranks, dtype):
    bones = [randn(C // rank, rank, rank).to(dtype) for rank in ranks]
    x, weight, bias, maa = (x.to(dtype) for x in (randn(1, 5, C), *randn(2, C), randn(2, C)))
    expected = norm_lerp(x, weight, bias, 1e-5, None, maa)[2]
    _, _, points, shifts = norm_lerp(x, weight, bias, 1e-5, None, maa, bones=bones)
    assert shifts == () and all(torch.equal(x, y) for x, y in zip(points, expected, strict=True))


@pytest.mark.parametrize("version", ("x060", "x070"))
def test_models_bend_what_their_layers_take(kernels, version, monkeypatch):
    """Each block's two norms: results and the gradients of all adapters, at most twice as far from float64 as where
    each layer bends for itself."""
    family = family_named(version)
    torch.manual_seed(0)
    model = family.build(family.new_dimensions(2, 128, 64))
    family.init_weights(model)
    inject(model, AdapterConfig(method="bone", mode="bat-in", rank=16), family=family)
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(randn(*parameter.shape, seed=i) / 16)
    calls = 2 * len(model.blocks)
    names, call = [], functions.call
    monkeypatch.setattr(affine, "call", lambda name, *rest, **sizes: (names.append(name), call(name, *rest, **sizes)))
    tokens, bounds = torch.arange(130)[None] % 64, torch.tensor([0, 17, 64, 130])

    def run(dtype):
        copied = copy.deepcopy(model).bfloat16().to(dtype)
        logits, _ = copied(tokens, cu_seqlens=bounds)
        logits.backward(randn(*logits.shape).bfloat16().to(dtype))
        return [logits, *(p.grad for p in copied.parameters() if p.requires_grad)]

    found = run(torch.bfloat16)
    assert names.count("lerp_affine_forward") == names.count("lerp_affine_backward") == calls
    monkeypatch.setattr(affine, "takes", lambda *_: False)
    plain = run(torch.bfloat16)
    assert names.count("lerp_affine_forward") == calls
    monkeypatch.setattr(op, "fused", lambda *_: False)
    for x, low, exact in zip(found, plain, run(torch.float64), strict=True):
        assert (x.double() - exact).norm() <= 2 * (low.double() - exact).norm()
