"""Bone's CUDA kernels, run on the CPU through tests/cuda_shim: against the float64 formulas, every kernel, odd sizes;
through the adapters; and under several orders of the threads."""

from functools import partial

import pytest
import torch

from cuda_shim import shim, toolchain
from ops.bone.cases import (
    FACTOR,
    SIZES,
    assert_as_exact_as_torch,
    merged,
    merged_gradient,
    plain,
    tensors,
    tiled,
    total,
)
from rwkv_peft.adapters.functions.bat_in import bat_in
from rwkv_peft.adapters.functions.bone import bone as bone_of
from rwkv_peft.adapters.product import Frozen
from rwkv_peft.ops.bone import cuda, op

DTYPES = (torch.float32, torch.bfloat16)


def ours(x, bone, g, dz):
    dx, (z, shift) = dz.clone(), cuda.affine(x, bone, FACTOR)
    return z, shift.sum(0), dx, cuda.affine_backward_(dx, g, x, bone, FACTOR)


@pytest.mark.parametrize("sizes", [*SIZES, (70, 1024, 64, 64), (33, 34, 17, 17), (20, 63, 21, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_forward_and_backward(kernels, dtype, sizes, monkeypatch):
    """With few blocks a sum over shards is one part, and a block has several tiles of tokens in backward."""
    if sizes[-1] > cuda.MOST_RANK and dtype == torch.float32:
        pytest.skip("plain torch, which is fast there")
    _, inputs = tensors(sizes, dtype, spread=2)
    assert_as_exact_as_torch(ours(*inputs), inputs, plain)
    monkeypatch.setattr(cuda, "BLOCKS", 2)
    assert_as_exact_as_torch(ours(*inputs), inputs, plain)


@pytest.mark.parametrize("count, width, rank", [(3, 64, 16), (1, 320, 32), (2, 1088, 64), (2, 256, 128)])
def test_merging_by_output_block_and_its_gradient(kernels, count, width, rank, monkeypatch):
    rows, d = (torch.randn(count * rank, width).bfloat16() for _ in range(2))
    bone = (0.1 * torch.randn(count, rank, rank)).bfloat16()
    for blocks in (256, 2):
        monkeypatch.setattr(cuda, "BLOCKS", blocks)
        assert_as_exact_as_torch([cuda.merge(rows, bone)], (rows, bone), lambda *x: (merged(*x),))
    again, gradient = op.merge_backward_(d, rows, bone)
    assert torch.equal(again, cuda.merge(rows, bone))
    assert_as_exact_as_torch([gradient], (rows, bone, d), lambda *x: (merged_gradient(*x),))
    assert torch.equal(cuda.merge(rows, torch.zeros_like(bone)), rows)


@pytest.mark.parametrize("rank", (16, 17))
def test_affine_without_the_gradient_of_the_matrices(kernels, rank):
    _, (x, bone, g, dz) = tensors((70, 4 * rank, 2 * rank, rank), torch.bfloat16)
    assert cuda.affine_backward_(dx := dz.clone(), g, None, bone, FACTOR) is None
    assert torch.equal(dx, ours(x, bone, g, dz)[2])


@pytest.mark.parametrize("rank", (20, 21, 24, 22))
@pytest.mark.parametrize("width", (3, 22, 64, 200))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_add_up_and_tiles_repeat_with_a_short_last_one(kernels, dtype, width, rank):
    x, tile = torch.randn(131, width).to(dtype), torch.randn(131, rank).to(dtype)
    assert_as_exact_as_torch([cuda.shard_sum(x, rank)], (x, tile), total)
    parts = torch.stack((tile, tile.flip(0)))
    for given, whole in ((tile, tile), (parts, parts.sum(0))):
        assert_as_exact_as_torch([cuda.tiled(given, width)], (torch.zeros_like(x), whole), tiled)


def test_one_shard_is_its_own_sum(kernels):
    x = torch.randn(7, 20)
    assert cuda.shard_sum(x, 20) is x


@pytest.mark.parametrize("function", (bat_in, partial(bat_in, scale=6.5), bone_of), ids=("bat-in", "scaled", "bone"))
@pytest.mark.parametrize("width", (64, 16))
def test_an_adapter_through_the_kernels(kernels, function, width):
    """x and g are slices of a larger tensor, at an address that is no multiple of 16 bytes; `width` is
    that of bone's mini form."""
    shape = (32, width) if function is bone_of else (4, 32, 32)
    whole, weight = torch.randn(2, 9, 130), torch.randn(64, 128) / 11
    parameter = 0.1 * torch.randn(shape)

    def run(dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (whole, parameter)]
        y = function(leaves[0][..., 1:129], Frozen(weight.to(dtype)), leaves[1])
        y.backward(torch.ones((), dtype=dtype).expand_as(y))
        return [y.detach(), *(x.grad for x in leaves)]

    for found, true in zip(run(torch.float32), run(torch.float64), strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-4)


def test_a_rank_beyond_the_kernels_takes_plain_torch():
    low = torch.empty(8, 512, device="meta", dtype=torch.bfloat16)
    takes = {(dtype, rank): cuda.takes(low.to(dtype), rank=rank) for dtype in DTYPES for rank in (64, 96, 128, 256)}
    assert [key for key, taken in takes.items() if taken] == [(DTYPES[0], 64), (DTYPES[1], 64), (DTYPES[1], 128)]
    z, shift = op.affine(low, low.new_empty(2, 256, 256))
    assert z.shape == low.shape and shift.shape == (8, 256)


@pytest.mark.parametrize("order", shim.ORDERS[1:])
def test_the_order_of_threads_changes_no_bit(kernels, order, monkeypatch):
    monkeypatch.setattr(cuda, "BLOCKS", 2)
    cases = [tensors((150, 256, 64, rank), dtype)[1] for rank, dtype in ((64, DTYPES[1]), (16, DTYPES[0]))]
    cases.append(tensors((70, 256, 128, 128), DTYPES[1])[1])
    rows, bone = torch.randn(64, 192).bfloat16(), torch.randn(1, 64, 64).bfloat16()

    def results():
        return [*(x for case in cases for x in ours(*case)), cuda.merge(rows, bone)]

    expected = results()
    kernels.set_order(order)
    assert all(torch.equal(x, y) for x, y in zip(results(), expected, strict=True))


def test_the_driver_is_asked_for_a_block_a_tile_and_group(monkeypatch):
    recorder = toolchain.record(cuda.FAMILY, monkeypatch)
    x = torch.randn(130, 512).bfloat16()
    cuda.affine(x, torch.randn(8, 64, 64).bfloat16())
    ((sizes, stream, arguments, extra),) = recorder.launches
    assert sizes == [3 * 8, 1, 1, recorder.constant, 1, 1, recorder.constant] and stream == 7 and extra is None
    assert (arguments.tokens, arguments.width, arguments.rank, arguments.groups) == (130, 512, 64, 8)
    assert arguments.x == x.data_ptr() and arguments.g is None
