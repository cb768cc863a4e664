"""Sums over shards of a norm's points, made by the CUDA kernels that make the points, run on the CPU through
tests/cuda_shim: against the float64 plain form, every gradient, packing; under several orders of the threads."""

import pytest
import torch
import torch.nn.functional as F

from cuda_shim import shim
from ops.mix.cases import assert_wanted_as_accurate, differentiated, randn
from ops.mix.test_lefts_cuda import DTYPES
from ops.mix.test_mix_cuda import ddlerp_inputs
from rwkv_peft.ops.mix import functions, gpu_lerp, norm_ddlerp, norm_lerp, norms


def summed(points, ranks, shifts):
    """Points and their sums, those of kernels or, of none, plain ones."""
    if shifts:
        return [*points, *shifts]
    plain = [(x, rank) for x, rank in zip(points, ranks) if rank is not None]
    rows = [(F.pad(x.flatten(0, 1), (0, -x.shape[-1] % rank)), rank) for x, rank in plain]
    return [*points, *(x.unflatten(1, (-1, rank)).sum(1) for x, rank in rows)]


def lerp_of(ranks, bounds=None, twice=None, offset=0, whole=False):
    """norm_lerp with sums of x, which lies `offset` elements into its memory."""

    def function(x, left, last, weight, bias, maa):
        x = torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)
        norm = x, weight, bias, 1e-5, last, maa, bounds
        total, ends, points, shifts = norm_lerp(*norm, whole=whole, twice=twice, left=left, bones=ranks)
        normal, points = points[:whole], points[whole:]
        return [total, ends, *normal, *summed(points, ranks, shifts)]

    return function


def lerp_inputs(B, T, C, ranks, parts, sequences):
    left = randn(parts, B * T, max(filter(None, ranks))) if parts else None
    return [randn(B, T, C) + 0.5, left, randn(sequences, C, seed=2), *randn(2, C), randn(len(ranks), C, seed=1)]


def ddlerp_of(ranks, bounds=None):
    def function(x, y, gate, last, weight, bias, *others):
        *factors, left_y, left_gate = others
        norm = x, y, gate, weight, bias, 1e-5, last, *factors, bounds, left_y, left_gate
        total, ends, low, points, shifts = norm_ddlerp(*norm, bones=ranks)
        return [total, ends, low, *summed(points, ranks, shifts)]

    return function


@pytest.fixture
def launched(monkeypatch):
    """The names of mix's launches that give sums over shards of points, or add such sums' gradients."""
    names, call = [], functions.cpu.call

    def recorded(name, like, tensors, **sizes):
        keys = {key.rstrip("s0123456789") for key, x in tensors.items() if x is not None}
        names.extend([name] * (sizes.get("summed", 0) > 0 and bool(keys & {"shift", "gshift"})))
        call(name, like, tensors, **sizes)

    monkeypatch.setattr(functions.cpu, "call", recorded)
    return names


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, ranks, parts, twice, offset, lengths",
    [
        ((2, 9, 48), (16,), 0, None, 0, None),
        ((1, 21, 96), (32, None), 3, None, 0, (1, 4, 1, 15)),
        ((1, 7, 2368), (None, 64), 0, 1, 0, (3, 4)),
        ((1, 5, 1152), (128, None, 128, 128, None, None), 1, 3, 2, None),
        ((3, 3, 4096), (None, 128, None, 128), 0, 0, 0, None),
        ((1, 3, 64), (64, 64, 64), 2, 2, 2, None),
    ],
)
def test_points_whose_weights_are_the_same_for_all_tokens(
    kernels, launched, shape, ranks, parts, twice, offset, lengths, dtype, monkeypatch
):
    """Of rows that a block's threads have at once and of longer ones, also from an address that is no multiple of 16
    bytes, where a warp has less than a shard; blocks of several tokens; a point that has a second user; what was left
    of x; and the norm itself."""
    monkeypatch.setattr(norms, "STRIPS", 4)
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    inputs = lerp_inputs(*shape, ranks, parts, shape[0] if lengths is None else len(lengths))
    function = lerp_of(ranks, bounds, twice, offset, whole=parts > 0)
    assert_wanted_as_accurate(function, inputs, (0, 1, 2), dtype, monkeypatch)
    assert launched == ["norm_lerp_forward", "norm_lerp_backward"]


@pytest.mark.parametrize("low_rank, lengths", [(32, None), (64, None), (32, (1, 62, 1, 1, 65)), (64, (64, 63))])
@pytest.mark.parametrize(
    "rank, which, with_last, gated, groups",
    [(64, range(4), False, True, 1), (32, (0, 3), True, False, 3), (16, (2,), True, True, 8)],
)
def test_points_whose_weights_depend_on_the_token(
    kernels, launched, low_rank, lengths, rank, which, with_last, gated, groups, monkeypatch
):
    """Rows and sequences that end in, at and after a tile of tokens; channels and tokens in one block and in several;
    some points summed and some not; beside what was left of another rank."""
    monkeypatch.setattr(gpu_lerp, "MOST_GROUPS", groups)
    B, T, bounds = 2, 65, None
    if lengths is not None:
        B, T, bounds = 1, sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    sequences = B if bounds is None else len(lengths)
    inputs = ddlerp_inputs(B, T, 192, low_rank, sequences if with_last else None, gated=gated)
    inputs += [randn(2, B * T, 16, seed=i) for i in range(2)] if gated else [None, None]
    ranks = [rank if i in which else None for i in range(4)]
    wanted = [i for i in (0, 1, 2, 3, 11, 12) if inputs[i] is not None]
    assert_wanted_as_accurate(ddlerp_of(ranks, bounds), inputs, wanted, torch.bfloat16, monkeypatch)
    assert launched == ["lerp_affine_forward", "lerp_low_backward"]


@pytest.mark.parametrize("used", range(2, 10))
def test_results_that_nobody_uses_count_as_zeros(kernels, used):
    """Of the decay's factor, points and sums."""
    x, y, gate, _, weight, bias, *factors = ddlerp_inputs(1, 5, 64, 32, gated=True)
    x.requires_grad_()
    *outs, points, shifts = norm_ddlerp(x, y, gate, weight, bias, 1e-5, None, *factors, bones=[16, None, 16, 16])
    *more, mixed, totals = norm_lerp(x, weight, bias, 1e-5, None, factors[2], bones=[16, None, 16, 16, None])
    for all_outs in ([*outs, *points, *shifts], [*more, *mixed, *totals]):
        grads = [randn(*out.shape, seed=i).bfloat16() * (i == used) for i, out in enumerate(all_outs)]
        (expected,) = torch.autograd.grad(all_outs, x, grads, retain_graph=True)
        (found,) = torch.autograd.grad(all_outs[used], x, grads[used], retain_graph=True)
        assert torch.equal(found, expected) and found.any()


@pytest.mark.parametrize(
    "C, ranks, parts, trained",
    [
        (96, (24, 24), 0, None),
        (96, (64, None), 0, None),
        (96, (32, 16), 0, None),
        (64, (32, 32, 32, 32), 0, None),
        (64, (None, None), 0, None),
        (64, (16, randn(4, 16, 16).bfloat16()), 0, None),
        (64, (32, 32), 0, 3),
        (64, (32, 32), 0, 5),
    ],
)
def test_what_no_kernel_sums_up_is_given_alone(kernels, launched, C, ranks, parts, trained):
    """Other ranks, and shards that no row consists of; two of them; too many; none; beside matrices; trained norms."""
    inputs = [randn(1, 5, C), None, randn(1, C), *randn(2, C), randn(len(ranks), C)]
    x, _, last, *frozen = (x if x is None else x.bfloat16() for x in inputs)
    if trained is not None:
        frozen[trained - 3].requires_grad_()
    expected = norm_lerp(x, *frozen[:2], 1e-5, last, frozen[2])[2]
    _, _, points, shifts = norm_lerp(x, *frozen[:2], 1e-5, last, frozen[2], bones=ranks)
    assert shifts == () and launched == [] and all(torch.equal(x, y) for x, y in zip(points, expected, strict=True))


def test_what_was_left_in_other_shards_has_the_kernel_alone(kernels, launched):
    x, left, last, weight, bias, maa = (x.bfloat16() for x in lerp_inputs(1, 5, 64, (16,), 2, 1))
    total, _, _, shifts = norm_lerp(x, weight, bias, 1e-5, last, maa, left=left, bones=[32])
    assert shifts == () and launched == [] and not torch.equal(total, x)


@pytest.mark.parametrize("rank, dtype", [(128, torch.bfloat16), (24, torch.bfloat16), (16, torch.float32)])
def test_points_of_ddlerp_that_no_kernel_sums_up(kernels, launched, rank, dtype):
    x, y, gate, last, weight, bias, *factors = ddlerp_inputs(1, 5, 384, 32, 1, dtype, gated=True)
    *_, shifts = norm_ddlerp(x, y, gate, weight, bias, 1e-5, last, *factors, bones=4 * [rank])
    assert shifts == () and launched == []


def test_a_gradient_at_any_address_is_read_16_bytes_at_once(kernels, monkeypatch):
    read, call = {}, functions.cpu.call
    monkeypatch.setattr(
        functions.cpu, "call", lambda name, *rest, **sizes: (read.update({name: rest[1]}), call(name, *rest, **sizes))
    )
    x, _, _, _, weight, bias, *factors = ddlerp_inputs(1, 3, 64, 32)
    *_, shifts = norm_ddlerp(
        x.requires_grad_(), None, None, weight, bias, 1e-5, None, *factors, bones=[16, *3 * [None]]
    )
    shifts[0].backward(randn(2 + 48).bfloat16()[2:].view(3, 16))
    assert read["lerp_low_backward"]["gshift1"].data_ptr() % 16 == 0 and x.grad.isfinite().all()


@pytest.mark.parametrize("order", shim.ORDERS[1:])
def test_the_order_of_threads_changes_no_bit(kernels, order, monkeypatch):
    ranks = 64, 64, None, 64
    inputs = [x.bfloat16() for x in lerp_inputs(1, 9, 2112, ranks, 3, 1)]
    weighted = [*ddlerp_inputs(1, 70, 320, 32, 1, gated=True), None, None]

    def results():
        both = differentiated(ddlerp_of(ranks), weighted, (0, 1, 2, 3), torch.bfloat16)
        return [*differentiated(lerp_of(ranks, twice=1), inputs, (0, 1, 2), torch.bfloat16), *both]

    expected = results()
    kernels.set_order(order)
    monkeypatch.setattr(norms, "STRIPS", 2)  # nor does a block's length
    assert all(torch.equal(x, y) for x, y in zip(results(), expected, strict=True))
