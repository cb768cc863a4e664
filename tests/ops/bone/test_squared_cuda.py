"""bat-in's affine form of a squared relu: its CUDA kernels, run on the CPU through tests/cuda_shim, against float64."""

import pytest
import torch

from cuda_shim import shim
from ops.bone.cases import FACTOR, assert_as_exact_as_torch, plain, tensors
from rwkv_peft.ops import bone as bone_ops
from rwkv_peft.ops.bone import cuda

# tokens, in, out, rank: shards that groups do not divide, one shard, tiles that are not full, several strips
SIZES = [(1, 48, 32, 16), (71, 7 * 32, 64, 32), (130, 5 * 64, 64, 64), (33, 64, 192, 64), (301, 3 * 128, 128, 128)]


def case(sizes, spread=1):
    """x, bone, g, dz and deferred (T, r), in bfloat16; some x + deferred are 0."""
    tokens, _, _, rank = sizes
    _, (x, *others) = tensors(sizes, torch.bfloat16, spread)
    deferred = torch.randn(tokens, rank, generator=torch.Generator().manual_seed(5)).bfloat16()
    x[:, :rank:3] = -deferred[:, ::3]
    return x, *others, deferred


def squared(x, bone, g, dz, deferred):
    """z, shift, dx, the gradient of bone, and that of deferred."""
    rank = deferred.shape[1]
    positive = torch.relu(x + deferred.repeat(1, x.shape[1] // rank))
    z, shift, ds, d_bone = plain(positive.square(), bone, g, dz)
    dx = 2 * positive * ds
    return z, shift, dx, d_bone, dx.unflatten(1, (-1, rank)).sum(1)


def ours(x, bone, g, dz, deferred):
    dx, (z, shift) = dz.clone(), bone_ops.affine(x, bone, FACTOR, deferred)
    d_bone = bone_ops.affine_backward_(dx, g, x, bone, FACTOR, deferred)
    return z, shift.sum(0), dx, d_bone, bone_ops.shard_sum(dx, deferred.shape[1])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward_and_backward(kernels, launched, sizes, monkeypatch):
    """With few blocks a sum over shards is one part, and a block has several tiles of tokens in backward."""
    inputs = case(sizes, spread=2)
    for blocks in (256, 2):
        monkeypatch.setattr(cuda, "BLOCKS", blocks)
        assert_as_exact_as_torch(ours(*inputs), inputs, squared)
    assert f"squared_backward_products_{sizes[-1]}" in launched and not [x for x in launched if "affine" in x]


@pytest.mark.parametrize("sizes", [(70, 100, 60, 20), (9, 96, 48, 48)], ids=str)
def test_a_rank_without_such_kernels_squares_apart(kernels, launched, sizes):
    inputs = case(sizes)
    assert_as_exact_as_torch(ours(*inputs), inputs, squared)
    assert not [x for x in launched if "squared" in x]


def test_what_is_not_positive_has_no_gradient_and_nan_stays(kernels):
    x, bone, g, dz, deferred = case((70, 128, 64, 64))
    z, _, dx, d_bone, _ = ours(-x.abs() - 9, bone, g, dz, deferred)
    assert not z.any() and not dx.any() and not d_bone.any()
    x[3, 5] = float("nan")
    z, _, dx, _, _ = ours(x, bone, g, dz, deferred)
    assert z[3, :64].isnan().all() and dx[3, 5].isnan() and not z[3, 64:].isnan().any() and not z[4:].isnan().any()


@pytest.mark.parametrize("order", shim.ORDERS[1:])
def test_the_order_of_threads_changes_no_bit(kernels, order, monkeypatch):
    monkeypatch.setattr(cuda, "BLOCKS", 2)
    cases = [case((150, 4 * rank, 2 * rank, rank)) for rank in (64, 128)]
    expected = [x for inputs in cases for x in ours(*inputs)]
    kernels.set_order(order)
    assert all(map(torch.equal, [x for inputs in cases for x in ours(*inputs)], expected))
