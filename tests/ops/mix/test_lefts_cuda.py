"""What adapters left, added by the CUDA kernels of the norms that read it, run on the CPU through tests/cuda_shim:
against the float64 plain form, every gradient, packing; under several orders of the threads."""

import pytest
import torch

from cuda_shim import shim
from ops.mix.cases import assert_wanted_as_accurate, differentiated, randn
from ops.mix.test_mix_cuda import ddlerp_inputs
from rwkv_peft.ops.mix import norm_ddlerp, norm_lerp, norms

DTYPES = (torch.float32, torch.bfloat16)


def assert_as_accurate(function, inputs, wanted, dtype, monkeypatch, fused=True):
    """By kernels, where they are to be `fused`, and within their bounds in any case."""
    found = assert_wanted_as_accurate(function, inputs, wanted, dtype, monkeypatch)
    name = "NormDDLerpBackward" if len(inputs) > 6 else "NormLerpBackward"
    assert (type(found[2].grad_fn).__name__ == name) == fused


def lerp_of_sum(bounds, offset=0):
    """norm_lerp of x, which lies `offset` elements into its memory, and of what was left of it."""

    def function(x, left, last, weight, bias, maa):
        whole = torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)
        total, ends, points, _ = norm_lerp(whole, weight, bias, 1e-5, last, maa, bounds, twice=0, left=left)
        return [total, ends, *points]

    return function


def lerp_inputs(B, T, C, rank, parts, sequences):
    left = randn(parts, B * T, rank) if parts else None
    return [randn(B, T, C) + 0.5, left, randn(sequences, C, seed=2), *randn(2, C), randn(2, C, seed=1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, rank, parts, offset, lengths",
    [
        ((2, 9, 48), 16, 1, 0, None),
        ((1, 21, 96), 32, 3, 0, (1, 4, 1, 15)),
        ((1, 7, 2368), 64, 2, 0, (3, 4)),
        ((1, 5, 1152), 128, 8, 2, None),
        ((3, 3, 4096), 128, 1, 0, None),
        ((1, 3, 64), 64, 2, 2, None),
    ],
)
def test_what_was_left_of_x(kernels, shape, rank, parts, offset, lengths, dtype, monkeypatch):
    """Of rows that a block's threads have at once and of longer ones, also from an address that is no multiple of 16
    bytes, where a warp has less than a shard; blocks of several tokens."""
    monkeypatch.setattr(norms, "STRIPS", 4)
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    inputs = lerp_inputs(*shape, rank, parts, shape[0] if lengths is None else len(lengths))
    assert_as_accurate(lerp_of_sum(bounds, offset), inputs, (0, 1, 2), dtype, monkeypatch)


def gated(bounds):
    """norm_ddlerp with what was left of y and gate last."""

    def function(x, y, gate, last, weight, bias, *others):
        *factors, left_y, left_gate = others
        more = dict(left_y=left_y, left_gate=left_gate)
        total, ends, low, points, _ = norm_ddlerp(x, y, gate, weight, bias, 1e-5, last, *factors, bounds, **more)
        return [total, ends, low, *points]

    return function


def gated_inputs(B, T, C, rank, parts, sequences, dtype=torch.bfloat16):
    lefts = [randn(n, B * T, rank, seed=i).to(dtype) if n else None for i, n in enumerate(parts)]
    return [*ddlerp_inputs(B, T, C, 32, sequences, dtype, gated=True), *lefts]


WANTED = (0, 1, 2, 3, 11, 12)


@pytest.mark.parametrize("shape, rank", [((2, 9, 96), 16), ((1, 70, 320), 64), ((1, 5, 2176), 128), ((1, 5, 96), 32)])
@pytest.mark.parametrize("parts", [(1, 1), (3, 3), (2, 0), (0, 4), (1, 2)])
def test_what_was_left_of_a_gated_residual(kernels, shape, rank, parts, monkeypatch):
    monkeypatch.setattr(norms, "STRIPS", 4)
    bounds = torch.tensor([0, 1, 63, 64, 70]) if shape[1] == 70 else None
    inputs = gated_inputs(*shape, rank, parts, shape[0] if bounds is None else 4)
    assert_as_accurate(gated(bounds), inputs, WANTED, torch.bfloat16, monkeypatch)


@pytest.mark.parametrize("ranks", [(24, 24), (8, 8), (32, 16)])
def test_what_no_kernel_adds_is_added_before(kernels, ranks, monkeypatch):
    """Shards of another width than kernels have, and of two."""
    inputs = gated_inputs(1, 9, 96, 1, (0, 0), 1)
    inputs[-2:] = (randn(2, 9, rank) for rank in ranks)
    assert_as_accurate(gated(None), inputs, WANTED, torch.bfloat16, monkeypatch, fused=False)


@pytest.mark.parametrize("trained", (3, 5))
def test_trained_norms_and_points_read_the_sum(kernels, trained, monkeypatch):
    inputs = lerp_inputs(1, 5, 48, 16, 2, 1)
    assert_as_accurate(lerp_of_sum(None), inputs, (0, 1, 2, trained), torch.float32, monkeypatch, fused=False)


def test_each_shard_has_it_added():
    """By the definition; and each part's gradient is the sum's over shards."""
    (x, left, last, *others), g = lerp_inputs(2, 3, 12, 4, 2, 2), randn(2, 3, 12, seed=9)
    total, *_ = norm_lerp(x, *others[:2], 1e-5, last, others[2], left=left.requires_grad_())
    torch.testing.assert_close(total, x + left.sum(0).view(2, 3, 4).repeat(1, 1, 3))
    total.backward(g)
    torch.testing.assert_close(left.grad, g.view(1, 6, 3, 4).sum(2).expand(2, 6, 4))


@pytest.mark.parametrize("order", shim.ORDERS[1:])
def test_the_order_of_threads_changes_no_bit(kernels, order, monkeypatch):
    inputs = [x.bfloat16() for x in lerp_inputs(1, 9, 2112, 64, 3, 1)]

    def results():
        both = differentiated(gated(None), gated_inputs(1, 9, 320, 64, (2, 2), 1), WANTED, torch.bfloat16)
        return [*differentiated(lerp_of_sum(None), inputs, (0, 1, 2), torch.bfloat16), *both]

    expected = results()
    kernels.set_order(order)
    monkeypatch.setattr(norms, "STRIPS", 2)  # nor does a block's length
    assert all(torch.equal(x, y) for x, y in zip(results(), expected, strict=True))
