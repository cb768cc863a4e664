"""Bone's kernels: each instruction set's, and a GPU's on tests/cuda_shim, agree with the formula in float64, and err no
more than plain torch does. If the processor has no matrix unit, tests/amx_shim stands in for it."""

import functools
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cuda_shim.shim import ORDERS, built, record
from rwkv_peft.adapters.functions.bat_in import bat_in
from rwkv_peft.adapters.functions.bone import bone as bone_function
from rwkv_peft.adapters.product import Frozen
from rwkv_peft.ops import bone as bone_op
from rwkv_peft.ops.bone import affine, cuda
from rwkv_peft.ops.bone import cpu as blocks
from rwkv_peft.ops.native.build import compiler_knows

DTYPES = (torch.float32, torch.bfloat16)
# tokens, in, out, rank: odd counts of tokens, ranks that are no whole number of vectors, one shard, many tiles
SIZES = [
    *((1, 480, 96, 32), (7, 128, 192, 64), (301, 192, 64, 64), (530, 36, 24, 12), (131, 30, 15, 5)),
    *((33, 80, 40, 20), (300, 80, 32, 16), (260, 96, 48, 48), (40, 256, 384, 128)),
]


def tensors(sizes, dtype, spread=1):
    """x, bone, g, dz; x and g are rows that lie `spread` rows apart."""
    tokens, in_features, out_features, rank = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = (spread * tokens, in_features), (in_features // rank, rank, rank), (spread * tokens, out_features)
    x, bone, g, dz = (torch.randn(shape, generator=generator) for shape in (*shapes, (tokens, in_features)))
    x, bone, g, dz = (t.to(dtype) for t in (x, 0.1 * bone, g, dz))
    return [x, bone, g, dz], [x[::spread], bone, g[::spread], dz]


def plain(x, bone, g, dz):
    """z, shift, dx and the gradient of bone, by the formula."""
    rank = bone.shape[-1]
    shards = x.unflatten(1, (-1, rank))
    u = torch.einsum("bij,tbj->tbi", bone, shards)
    du = dz.unflatten(1, (-1, rank)) + g.unflatten(1, (-1, rank)).sum(1)[:, None]
    dx = dz + torch.einsum("tbi,bij->tbj", du, bone).flatten(1)
    return (shards + u).flatten(1), u.sum(1), dx, torch.einsum("tbi,tbj->bij", du, shards)


def merged(rows, bone):
    """W + W B + B by output block."""
    count, rank, _ = bone.shape
    blocks_ = rows.view(count, rank, -1, rank)  # (a, i, b, j)
    return (blocks_ + torch.einsum("aibk,akj->aibj", blocks_, bone) + bone[:, :, None]).reshape(rows.shape)


def merged_gradient(rows, bone, d):
    """The gradient of bone, given that of merged(rows, bone)."""
    count, rank, _ = bone.shape
    rows, d = rows.view(count, rank, -1, rank), d.view(count, rank, -1, rank)
    return torch.einsum("aibk,aibj->akj", rows, d) + d.sum(2)


def total(x, tile):
    """Sums over shards as wide as tile, the last one padded."""
    rank = tile.shape[1]
    return (torch.nn.functional.pad(x, (0, -x.shape[1] % rank)).unflatten(1, (-1, rank)).sum(1),)


def tiled(x, tile):
    """x + tile, repeated."""
    return (x + tile.repeat(1, x.shape[1] // tile.shape[1] + 1)[:, : x.shape[1]],)


def assert_as_exact_as_torch(results, inputs, formula):
    """Within twice the error of the formula in the inputs' own dtype, or of rounding to that dtype."""
    exact = formula(*(t.double() for t in inputs))
    for result, low, true in zip(results, formula(*inputs), exact):
        rounding = (true.to(result.dtype).double() - true).norm()
        assert result.dtype == inputs[0].dtype
        assert (result.double() - true).norm() <= 2 * torch.maximum((low.double() - true).norm(), rounding)


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
    header = Path(__file__).parents[1] / "amx_shim" / "amx_shim.h"
    library = blocks.FAMILY.build_level("amx", "_shim", ("-include", str(header)), [header])
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
    return *blocks.affine(x, bone, level), dx, blocks.affine_backward_(dx, g, x, bone, level)


@pytest.mark.parametrize("number, sizes", list(enumerate(SIZES)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.processor
def test_affine_forward_and_backward(level, dtype, number, sizes):
    """One thread or two in rotation."""
    _, inputs = tensors(sizes, dtype, spread=2)
    with on_threads(1 + (number + (dtype == torch.float32)) % 2):
        assert_as_exact_as_torch(ours(*inputs, level), inputs, plain)


def test_affine_without_the_gradient_of_the_matrices(level):
    _, (x, bone, g, dz) = tensors((70, 64, 32, 16), torch.float32)
    assert blocks.affine_backward_(dx := dz.clone(), g, None, bone, level) is None
    assert torch.equal(dx, ours(x, bone, g, dz, level)[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.processor
def test_a_run_repeats_bit_by_bit(level, dtype, threads):
    _, inputs = tensors((301, 192, 64, 64), dtype)
    for first, again in zip(ours(*inputs, level), ours(*inputs, level)):
        assert torch.equal(first, again)


def test_zero_matrices_leave_every_row_as_it_is(level):
    _, (x, bone, g, dz) = tensors((301, 192, 64, 64), torch.bfloat16)
    z, shift, dx, _ = ours(x, torch.zeros_like(bone), g, dz, level)
    assert torch.equal(z, x) and torch.equal(dx, dz) and not shift.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.processor
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed(level, dtype, threads):
    for rows, columns in [(1, 1), (33, 70), (64, 96), (200, 301)]:
        x = torch.randn(rows, columns).to(dtype)
        for part in (x, x[:, : columns // 2 + 1], x.t()):
            assert torch.equal(blocks.transposed(part, level), part.t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.processor
def test_shards_add_up_and_tiles_repeat_with_a_short_last_one(level, dtype, threads):
    for width in (3, 22, 64, 200):
        x, tile = torch.randn(131, width).to(dtype), torch.randn(131, 20).to(dtype)
        assert_as_exact_as_torch([blocks.shard_sum(x, 20, level)], (x, tile), total)
        y = x.clone()
        blocks.add_tiled_(y, tile, level)
        assert_as_exact_as_torch([y], (x, tile), tiled)


def test_a_machine_without_a_compiler_takes_plain_torch(monkeypatch):
    _, (x, bone, _, _) = tensors((8, 64, 32, 16), torch.float32)
    compiled = affine(x, bone)
    monkeypatch.setattr(blocks.FAMILY, "unavailable", lambda: "no compiler")
    assert not blocks.FAMILY.takes(x, bone)
    torch.testing.assert_close(affine(x, bone), compiled)


@pytest.fixture
def kernels(monkeypatch):
    """Send CPU tensors through the CUDA kernels; tensors that they should fill begin as NaN."""
    shim, run = built(cuda.FAMILY), cuda.call

    def call(name, like, given, blocks, **sizes):
        for key in ("z", "shift", "parts", "total", "tiled"):
            if given.get(key) is not None and not (key == "parts" and name.startswith("sum_parts")):
                given[key].fill_(float("nan"))
        run(name, like, given, blocks, **sizes)

    monkeypatch.setattr(cuda.FAMILY, "kernels", lambda device: shim)
    monkeypatch.setattr(cuda, "call", call)
    monkeypatch.setattr(
        bone_op, "backend", lambda first, *others, rank=0: cuda if first.dtype == torch.bfloat16 else None
    )
    return shim


def cuda_results(x, bone, g, dz):
    dx, (z, shift) = dz.clone(), cuda.affine(x, bone)
    return z, shift.sum(0), dx, cuda.affine_backward_(dx, g, x, bone)


@pytest.mark.parametrize("sizes", [sizes for sizes in (*SIZES, (70, 1024, 64, 64)) if sizes[-1] in cuda.RANKS], ids=str)
def test_affine_on_a_gpu(kernels, sizes, monkeypatch):
    """With few blocks a sum over shards is one part, and a block has several tiles of tokens in backward."""
    _, inputs = tensors(sizes, torch.bfloat16, spread=2)
    assert_as_exact_as_torch(cuda_results(*inputs), inputs, plain)
    monkeypatch.setattr(cuda, "BLOCKS", 2)
    assert_as_exact_as_torch(cuda_results(*inputs), inputs, plain)


@pytest.mark.parametrize("count, width, rank", [(3, 64, 16), (1, 320, 32), (2, 1088, 64), (2, 256, 128)])
def test_merging_on_a_gpu(kernels, count, width, rank, monkeypatch):
    rows, d = (torch.randn(count * rank, width).bfloat16() for _ in range(2))
    bone = (0.1 * torch.randn(count, rank, rank)).bfloat16()
    for count_of_blocks in (256, 2):
        monkeypatch.setattr(cuda, "BLOCKS", count_of_blocks)
        assert_as_exact_as_torch([cuda.merge(rows, bone)], (rows, bone), lambda *x: (merged(*x),))
    again, gradient = bone_op.merge_backward_(d, rows, bone)
    assert torch.equal(again, cuda.merge(rows, bone))
    assert_as_exact_as_torch([gradient], (rows, bone, d), lambda *x: (merged_gradient(*x),))
    assert torch.equal(cuda.merge(rows, torch.zeros_like(bone)), rows)


def test_affine_on_a_gpu_without_the_gradient_of_the_matrices(kernels):
    _, (x, bone, g, dz) = tensors((70, 64, 32, 16), torch.bfloat16)
    assert cuda.affine_backward_(dx := dz.clone(), g, None, bone) is None
    assert torch.equal(dx, cuda_results(x, bone, g, dz)[2])


@pytest.mark.parametrize("rank", (20, 21, 24, 22))
@pytest.mark.parametrize("width", (3, 22, 64, 200))
def test_shards_and_tiles_on_a_gpu(kernels, width, rank):
    x, tile = torch.randn(131, width).bfloat16(), torch.randn(131, rank).bfloat16()
    assert_as_exact_as_torch([cuda.shard_sum(x, rank)], (x, tile), total)
    parts = torch.stack((tile, tile.flip(0)))
    for given, whole in ((tile, tile), (parts, parts.sum(0))):
        assert_as_exact_as_torch([cuda.tiled(given, width)], (torch.zeros_like(x), whole), tiled)


def test_one_shard_is_its_own_sum(kernels):
    x = torch.randn(7, 20).bfloat16()
    assert cuda.shard_sum(x, 20) is x


@pytest.mark.parametrize("function", (bat_in, bone_function), ids=("bat-in", "bone"))
@pytest.mark.parametrize("width", (64, 16))
def test_an_adapter_through_the_kernels(kernels, function, width, monkeypatch):
    """x and g are slices of a larger tensor, at an address that is no multiple of 16 bytes; `width` is
    that of bone's mini form."""
    shape = (32, width) if function is bone_function else (4, 32, 32)
    whole, weight = torch.randn(2, 9, 130), torch.randn(64, 128) / 11
    parameter = 0.1 * torch.randn(shape)

    def run(dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (whole, parameter)]
        y = function(leaves[0][..., 1:129], Frozen(weight.to(dtype)), leaves[1])
        y.backward(torch.ones((), dtype=dtype).expand_as(y))
        return [y.detach(), *(x.grad for x in leaves)]

    found, true = run(torch.bfloat16), run(torch.float64)
    monkeypatch.setattr(bone_op, "backend", lambda *_, rank=0: None)
    for ours, plain, exact in zip(found, run(torch.bfloat16), true, strict=True):
        assert (ours.double() - exact).norm() <= 2 * (plain.double() - exact).norm()


def test_a_rank_beyond_the_kernels_takes_plain_torch():
    low = torch.empty(8, 512, device="meta", dtype=torch.bfloat16)
    assert [rank for rank in (0, 20, 64, 96, 128, 256) if cuda.takes(low, rank=rank)] == [0, 64, 128]
    assert not cuda.takes(low.float(), rank=64)
    z, shift = bone_op.affine(low, low.new_empty(2, 256, 256))
    assert z.shape == low.shape and shift.shape == (8, 256)


@pytest.mark.parametrize("order", ORDERS[1:])
def test_the_order_of_threads_changes_no_bit(kernels, order, monkeypatch):
    monkeypatch.setattr(cuda, "BLOCKS", 2)
    sizes = ((150, 256, 64, 64), (150, 256, 64, 16), (70, 256, 128, 128))
    cases = [tensors(each, torch.bfloat16)[1] for each in sizes]
    rows, bone = torch.randn(64, 192).bfloat16(), torch.randn(1, 64, 64).bfloat16()

    def results():
        return [*(x for case in cases for x in cuda_results(*case)), cuda.merge(rows, bone)]

    expected = results()
    kernels.set_order(order)
    assert all(torch.equal(x, y) for x, y in zip(results(), expected, strict=True))


def test_the_driver_is_asked_for_a_block_a_tile_and_group(monkeypatch):
    recorder = record(cuda.FAMILY, monkeypatch)
    x = torch.randn(130, 512).bfloat16()
    cuda.affine(x, torch.randn(8, 64, 64).bfloat16())
    ((sizes, stream, arguments, extra),) = recorder.launches
    assert sizes == [3 * 8, 1, 1, recorder.constant, 1, 1, recorder.constant] and stream == 7 and extra is None
    assert (arguments.tokens, arguments.width, arguments.rank, arguments.groups) == (130, 512, 64, 8)
    assert arguments.x == x.data_ptr() and arguments.g is None
