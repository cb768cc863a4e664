"""Products of a few rows: every instruction set, the GPU's kernels on tests/cuda_shim, and the plain form, against
float64 of the matrix that they read."""

import pytest
import torch
import torch.nn.functional as F

from cuda_shim.shim import built, record
from rwkv_peft.ops import decode
from rwkv_peft.ops.decode import CPU, CUDA, CUDA_ROWS, MOST_ROWS, product, quantize
from rwkv_peft.ops.native.cpu import level_flags

SHAPES = [(1, 32), (16, 64), (33, 96), (130, 1056)]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def on_shim(monkeypatch):
    """Send CPU tensors through the CUDA kernels; results begin as NaN, and plain products of many rows have a few
    weights at a time. -> the shim, and the names of the kernels that ran."""
    shim, run, launched = built(CUDA), decode.call, []

    def call(name, x, weight, y, blocks):
        launched.append(name)
        run(name, x, weight, y.fill_(float("nan")), blocks)

    monkeypatch.setattr(CUDA, "kernels", lambda device: shim)
    monkeypatch.setattr(decode, "call", call)
    monkeypatch.setattr(decode, "CUDA_BAND", 1 << 15)
    monkeypatch.setattr(CUDA, "takes", lambda x: x.dtype == torch.bfloat16 and x.numel() > 0)
    monkeypatch.setattr(CPU, "takes", lambda *_: False)
    return shim, launched


@pytest.fixture(params=["plain", "cuda", *level_flags()])
def level(request, monkeypatch):
    """Let `product` compute in plain torch, or by the kernels of a level or of a GPU."""
    if request.param == "plain":
        monkeypatch.setattr(CPU, "unavailable", lambda: "no compiler")
        return request.param
    if request.param == "cuda":
        request.getfixturevalue("on_shim")
        return request.param
    if reason := CPU.unavailable(request.param):
        pytest.skip(reason)
    library = CPU.library(request.param)
    monkeypatch.setattr(CPU, "library", lambda level="": library)
    return request.param


def error(found, due):
    return ((found.double() - due).norm() / due.norm()).item()


def problem(rows, out, width, dtype):
    generator = torch.Generator().manual_seed(rows + out)
    x = torch.randn(rows, width, generator=generator) * torch.logspace(-2, 1, width)
    return x.to(dtype), torch.randn(out, width, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out, width", [*SHAPES, (3, 1), (5, 17), (9, 47), (70, 333)])
@pytest.mark.processor
def test_plain_matrices(level, out, width, dtype):
    for rows in (1, 2, 3, 4, 7, MOST_ROWS, MOST_ROWS + 1):
        x, weight = problem(rows, out, width, dtype)
        due = x.double() @ weight.double().t()
        plain = error(F.linear(x, weight), due)
        assert error(product(x, weight), due) <= 2 * plain + 2 * torch.finfo(torch.float32).eps, rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize("out, width", SHAPES)
@pytest.mark.processor
def test_blocks(level, bits, out, width, dtype):
    """x is rounded to integers of 8 bits; the largest number in a block of 32 becomes 127."""
    for rows in (1, 3, 8, 15, 19, MOST_ROWS + 3):
        x, weight = problem(rows, out, width, dtype)
        blocks = quantize(weight, bits)
        x64, matrix = x.double(), blocks.dequantized().double()
        largest = x64.unflatten(1, (-1, 32)).abs().amax(-1).repeat_interleave(32, 1)
        most = largest / 254 + torch.finfo(dtype).eps * x64.abs()  # also of the plain form's weights, and the result
        assert ((product(x, blocks).double() - x64 @ matrix.t()).abs() <= 1.01 * most @ matrix.abs().t()).all(), rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.processor
def test_a_rows_product_is_the_same_bits_in_any_company(dtype):
    if reason := CPU.unavailable():
        pytest.skip(reason)
    x, weight = problem(MOST_ROWS, 130, 1056, dtype)
    threads = torch.get_num_threads()
    try:
        for matrix in (weight, quantize(weight, 8), quantize(weight, 4)):
            together = product(x, matrix)
            for rows in (1, 2, 3, 5, 12):
                for number in (1, 3):
                    torch.set_num_threads(number)
                    assert torch.equal(product(x[:rows], matrix), together[:rows])
    finally:
        torch.set_num_threads(threads)


def test_rows_in_any_memory(level):
    x, weight = problem(6, 40, 64, torch.float32)
    shifted = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(40, 64)
    for matrix in (weight, weight.t().contiguous().t(), shifted):
        apart = x.repeat(1, 2)[:, :64].unflatten(0, (2, 3))
        assert torch.allclose(product(apart, matrix), apart @ matrix.t(), rtol=1e-4, atol=1e-4)
    blocks = quantize(weight, 8)
    torch.testing.assert_close(product(x.t().contiguous().t(), blocks), product(x, blocks), rtol=0, atol=0)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_damaged_rows_stay_damaged(level, value):
    x, weight = problem(2, 20, 64, torch.float32)
    x[1, 40] = value
    for matrix in (weight, quantize(weight, 8), quantize(weight, 4)):
        found = product(x, matrix)
        assert torch.isfinite(found[0]).all() and not torch.isfinite(found[1]).any()


def test_zeros_and_tiny_numbers(level):
    x, weight = problem(2, 20, 64, torch.float32)
    x[0], x[1, :32] = 0, 1e-44
    for matrix in (weight, quantize(weight, 8), quantize(0 * weight, 4)):
        found = product(x, matrix)
        assert torch.isfinite(found).all() and not found[0].any()


@pytest.mark.parametrize("bits, most", [(8, 0.006), (4, 0.09)])
def test_rounding_loses_little(bits, most):
    """Of normal weights; 32 of them share a scale, so the step is about 2 · 2.3 / 2^bits standard deviations."""
    _, weight = problem(1, 300, 512, torch.float32)
    weight[0, :32], weight[1, :32] = 0, 1e-3
    found = quantize(weight, bits)
    assert error(found.dequantized(), weight.double()) < most
    assert not found.dequantized()[0, :32].any()
    assert error(found.dequantized()[1, :32], weight[1, :32].double()) < 2**-7
    assert found.nbytes == pytest.approx(weight.numel() * (bits / 8 + 1 / 16), rel=0.02)  # 304 rows


def test_integers_and_their_scales_are_exact():
    """A matrix that blocks can hold comes back bit by bit, at any size of the bands that are packed at once."""
    generator = torch.Generator().manual_seed(0)
    for bits, most in ((8, 127), (4, 7)):
        integers = torch.randint(-most, most + 1, (50, 96), generator=generator).float()
        integers[:, ::32] = -most - 1  # each block's largest number is the scale's
        assert torch.equal(quantize(integers * 0.5, bits).dequantized(), integers * 0.5)


def test_gradients_of_plain_matrices():
    x, weight = problem(2, 20, 64, torch.float32)
    (gradient,) = torch.autograd.grad(product(x, weight.requires_grad_()).sum(), weight)
    torch.testing.assert_close(gradient, x.sum(0).expand(20, 64))


def test_blocks_need_whole_blocks():
    with pytest.raises(ValueError, match="48 columns"):
        quantize(torch.zeros(4, 48), 8)


@pytest.mark.parametrize("bits", (8, 4))
def test_a_gpus_rows_are_the_same_bits_in_any_company_and_order_of_threads(on_shim, bits):
    shim, launched = on_shim
    x, weight = problem(CUDA_ROWS, 33, 224, torch.bfloat16)
    blocks = quantize(weight, bits)
    together, matrix = product(x, blocks), decode.cuda_dequantized(blocks)
    assert torch.equal(matrix, blocks.dequantized(torch.bfloat16))
    for rows, order in ((2, "shuffled"), (5, "descending"), (CUDA_ROWS, "warps descending")):
        shim.set_order(order)
        assert torch.equal(product(x[:rows], blocks), together[:rows])
    torch.testing.assert_close(product(x[:1], blocks), together[:1])  # by more threads
    assert {name.rpartition("_")[2] for name in launched if name.startswith("product")} == {"1", "16"}


@pytest.mark.parametrize("bits, tiles", [(8, 4), (4, 8)])
def test_rows_on_a_gpu_are_split_while_that_reads_less_than_the_matrix(on_shim, bits, tiles):
    """A tile reads the integers; the matrix is written in bfloat16 and read again: 8 + 32 bits a weight, or 4 + 32."""
    x, weight = problem(CUDA_ROWS * tiles, 20, 64, torch.bfloat16)
    blocks = quantize(weight, bits)
    found = product(x, blocks)
    assert on_shim[1] == [f"product_{bits}_16"] * tiles
    assert torch.equal(found, torch.cat([product(rows, blocks) for rows in x.split(CUDA_ROWS)]))
    on_shim[1].clear()
    product(torch.cat([x, x[:1]]), blocks)
    assert not any(name.startswith("product") for name in on_shim[1])


def test_many_rows_on_a_gpu_take_the_matrix_in_bands(on_shim):
    x, weight = problem(4 * CUDA_ROWS + 1, 130, 1056, torch.bfloat16)
    blocks = quantize(weight, 8)
    due = F.linear(x, blocks.dequantized(torch.bfloat16))  # of other sizes, and so perhaps another order of sums
    torch.testing.assert_close(product(x, blocks), due, rtol=1 / 128, atol=0.05)
    assert on_shim[1] == ["dequantize_8"] * 9  # of a panel each


def test_float16_takes_a_cpus_kernels_of_float32():
    x, weight = problem(3, 20, 64, torch.float32)
    blocks = quantize(weight, 4)
    found = product(x.half(), blocks)
    assert found.dtype == torch.float16 and torch.equal(found, product(x.half().float(), blocks).half())
    assert product(x.half().repeat(9, 1), blocks).dtype == torch.float16


def test_the_driver_is_asked_for_a_block_a_panel(monkeypatch):
    recorder = record(CUDA, monkeypatch)
    x, weight = problem(3, 33, 64, torch.bfloat16)
    blocks = quantize(weight, 8)
    y = decode.cuda_product(x, blocks)
    ((sizes, stream, arguments, _),) = recorder.launches
    assert sizes[:4] == [3, 1, 1, recorder.constant] and stream == 7
    assert (arguments.in_features, arguments.out_features, arguments.rows) == (64, 33, 3)
    assert (arguments.x, arguments.words, arguments.y) == (x.data_ptr(), blocks.words.data_ptr(), y.data_ptr())
