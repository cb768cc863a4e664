"""Each instruction set's kernels agree with the formula in float64, and err no more than plain torch does.

If the processor has no matrix unit, tests/amx_shim stands in for it.
"""

import functools
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

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
from rwkv_peft.ops.bone import affine
from rwkv_peft.ops.bone import cpu as blocks
from rwkv_peft.ops.native.build import compiler_knows


@pytest.fixture(params=blocks.LEVELS)
def level(request, monkeypatch):
    """Each instruction set in turn, the matrix unit's on the shim if this processor lacks it."""
    if not blocks.FAMILY.unavailable(request.param):
        return request.param
    if request.param != "amx" or not (shim := amx_shim()):
        pytest.skip(f"no {request.param} here")
    monkeypatch.setattr(blocks.FAMILY, "library", lambda level: shim)
    return request.param


@functools.cache
def amx_shim():
    """bone.cpp for the matrix unit, built on the shim; None if the processor or the compiler is too old for it."""
    if blocks.FAMILY.unavailable("avx512") or not compiler_knows(blocks.level_flags()["amx"]):
        return None
    header = Path(__file__).parents[2] / "amx_shim" / "amx_shim.h"
    library = blocks.FAMILY.build("amx", "_shim", ("-include", str(header)), [header])
    return library if library.amx_shim_runs() else None


@pytest.fixture(params=[1, 2], ids=lambda count: f"{count} threads")
def threads(request):
    with on_threads(request.param):
        yield request.param


@contextmanager
def on_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ours(x, bone, g, dz, level):
    dx = dz.clone()
    return *blocks.affine(x, bone, level, FACTOR), dx, blocks.affine_backward_(dx, g, x, bone, level, FACTOR)


@pytest.mark.parametrize("number, sizes", list(enumerate(SIZES)), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_affine_forward_and_backward(level, dtype, number, sizes):
    """One thread or two in rotation."""
    _, inputs = tensors(sizes, dtype, spread=2)
    with on_threads(1 + (number + (dtype == torch.float32)) % 2):
        assert_as_exact_as_torch(ours(*inputs, level), inputs, plain)


def test_affine_without_the_gradient_of_the_matrices(level):
    _, (x, bone, g, dz) = tensors((70, 64, 32, 16), torch.float32)
    assert blocks.affine_backward_(dx := dz.clone(), g, None, bone, level, FACTOR) is None
    assert torch.equal(dx, ours(x, bone, g, dz, level)[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_repeats_bit_by_bit(level, dtype, threads):
    _, inputs = tensors((301, 192, 64, 64), dtype)
    for first, again in zip(ours(*inputs, level), ours(*inputs, level)):
        assert torch.equal(first, again)


def test_zero_matrices_leave_every_row_as_it_is(level):
    _, (x, bone, g, dz) = tensors((301, 192, 64, 64), torch.bfloat16)
    z, shift, dx, _ = ours(x, torch.zeros_like(bone), g, dz, level)
    assert torch.equal(z, x) and torch.equal(dx, dz) and not shift.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_by_output_block_and_its_gradient(level, dtype, threads):
    for sizes in [(1, 64, 64), (3, 320, 64), (2, 96, 48), (5, 60, 12), (3, 15, 5), (1, 512, 128)]:
        check_merging(level, dtype, *sizes)


def check_merging(level, dtype, count, in_features, rank):
    generator = torch.Generator().manual_seed(0)
    rows, d = (torch.randn(count * rank, in_features, generator=generator).to(dtype) for _ in range(2))
    bone = (0.1 * torch.randn(count, rank, rank, generator=generator)).to(dtype)
    assert_as_exact_as_torch([blocks.merge(rows, bone, level)], (rows, bone), lambda *x: (merged(*x),))
    becomes = d.clone()
    gradient = blocks.merge_backward_(becomes, rows, bone, level)
    assert_as_exact_as_torch([gradient], (rows, bone, d), lambda *x: (merged_gradient(*x),))
    assert torch.equal(becomes, blocks.merge(rows, bone, level))
    strided = torch.cat((rows, d), 1)[:, :in_features]
    assert torch.equal(blocks.merge(strided, bone, level), becomes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transposed(level, dtype, threads):
    for rows, columns in [(1, 1), (33, 70), (64, 96), (200, 301)]:
        x = torch.randn(rows, columns).to(dtype)
        for part in (x, x[:, : columns // 2 + 1], x.t()):
            assert torch.equal(blocks.transposed(part, level), part.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shards_add_up_and_tiles_repeat_with_a_short_last_one(level, dtype, threads):
    for width in (3, 22, 64, 200):
        x, tile = torch.randn(131, width).to(dtype), torch.randn(131, 20).to(dtype)
        assert_as_exact_as_torch([blocks.shard_sum(x, 20, level)], (x, tile), total)
        y = x.clone()
        blocks.add_tiled_(y, tile, level)
        assert_as_exact_as_torch([y], (x, tile), tiled)


def test_shapes_that_do_not_fit_are_refused():
    _, (x, bone, g, dz) = tensors((8, 64, 32, 16), torch.float32)
    if blocks.FAMILY.unavailable():
        pytest.skip("no compiler here")
    level = blocks.FAMILY.best_level()
    with pytest.raises(ValueError, match="rows of 64 are not 3 shards of 16"):
        blocks.affine(x, bone[:3], level)
    with pytest.raises(ValueError, match="rows of 31 are not shards of 16"):
        blocks.affine_backward_(dz, g[:, :31], x, bone, level)


def test_a_machine_without_a_compiler_takes_plain_torch(monkeypatch):
    _, (x, bone, _, _) = tensors((8, 64, 32, 16), torch.float32)
    compiled = affine(x, bone)
    monkeypatch.setattr(blocks.FAMILY, "unavailable", lambda: "no compiler")
    assert not blocks.FAMILY.takes(x, bone)
    torch.testing.assert_close(affine(x, bone), compiled)
