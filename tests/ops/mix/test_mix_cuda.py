"""The mix operations' CUDA kernels, run on the CPU through tests/cuda_shim: the product inside a lerp, empty sequences,
several orders of the threads, and launches."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from cuda_shim import shim, toolchain
from ops.mix.cases import bonus_gate, low_rank, randn, reads_inputs
from ops.mix.cases import run as run_both
from rwkv_peft.ops.mix import cpu, cuda, functions, lerp, norm_bonus_gate, op, shift

DTYPES = (torch.float32, torch.bfloat16)


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
    monkeypatch.setattr(shift, "MOST_GROUPS", groups)
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
    monkeypatch.setattr(op, "has_kernel", lambda *_: False)
    plain = frozen_lerp(inputs, torch.bfloat16, bounds)
    for i, (x, low, exact) in enumerate(zip(found, plain, true, strict=True)):
        assert (x.double() - exact).norm() <= 2 * (low.double() - exact).norm(), i


@pytest.mark.parametrize("order", shim.ORDERS[1:])
def test_the_order_of_threads_changes_no_bit_of_a_lerp_with_its_product(on_shim, order):
    inputs = [randn(1, 70, 64), randn(1, 64), randn(5, 64), *low_rank(1, 70, 64, 5, 64)]
    inputs = [x.bfloat16() for x in inputs]

    expected = frozen_lerp(inputs, torch.bfloat16, None)
    on_shim.set_order(order)
    assert all(torch.equal(x, y) for x, y in zip(frozen_lerp(inputs, torch.bfloat16, None), expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", (True, False), ids=("kernels", "plain"))
def test_empty_sequences_at_the_end_change_nothing_of_the_others(on_shim, dtype, kernel, monkeypatch):
    """The others' tokens are mixed with the same predecessors. The last token of an empty sequence is not defined."""
    monkeypatch.setattr(op, "has_kernel", op.has_kernel if kernel else lambda *_: False)
    bounds = torch.tensor([0, 1, 63, 64, 65, 130])
    raised = torch.cat([bounds, torch.tensor([130, 130, 130])])
    x, maa, (low, up) = randn(1, 130, 64), randn(5, 64), low_rank(1, 130, 64, 5, 32)
    x, maa, low, up = (tensor.to(dtype) for tensor in (x, maa, low, up))
    for factors in ((None, None), (low, up)):
        results = []
        for of in (bounds, raised):
            points = lerp(leaf := x.clone().requires_grad_(), None, maa, *factors, of)
            torch.autograd.backward(points, [randn(1, 130, 64, seed=i).to(dtype) for i in range(len(points))])
            results.append([*points, leaf.grad])
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("order", shim.ORDERS[1:])
def test_the_order_of_threads_changes_no_bit(on_shim, order, monkeypatch):
    """With more tokens than one strip has, so that sums over strips are added up, too."""
    inputs = reads_inputs(1, 70, 2, 20)
    points = [randn(1, 70, 36), randn(1, 36), randn(6, 36), *low_rank(1, 70, 36, 6, 4)]

    def results():
        both = ((bonus_gate, inputs), (lerp, points))
        return [x for function, given in both for x in run_both(function, given, torch.float32, False, monkeypatch)]

    expected = results()
    on_shim.set_order(order)
    assert all(torch.equal(x, y) for x, y in zip(results(), expected, strict=True))


def test_frozen_parameters_have_no_sums(on_shim, monkeypatch):
    wanted = []
    call = cpu.call
    monkeypatch.setattr(cpu, "call", lambda *rest, **sizes: (wanted.append(rest[2]), call(*rest, **sizes)))
    y, r, k, v, g, *parameters = reads_inputs(1, 5, 2, 4)
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
    recorder, x = toolchain.record(cuda.FAMILY, monkeypatch), randn(70, 300)
    cuda.call("relu_square_forward", x, dict(x=x, out=torch.empty_like(x)), tokens=70, channels=300)
    ((sizes, stream, arguments, extra),) = recorder.launches
    assert sizes == [3 * 3, 1, 1, recorder.constant, 1, 1, recorder.constant] and stream == 7 and extra is None
    assert (arguments.tokens, arguments.channels, arguments.size, arguments.strip) == (70, 300, 128, 32)
    assert arguments.inputs[0] == x.data_ptr() and arguments.inputs[1] is None
