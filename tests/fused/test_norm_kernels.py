"""Norm and token shift in one pass, by the CUDA kernels on the CPU (tests/cuda_shim): against separate norm and points
in float64, with every gradient, over odd lengths, states and packing."""

import pytest
import torch
from torch import nn

from cuda_shim import running, shim
from ops.mix.cases import randn
from rwkv_peft.fused import norm_ddlerp as ddlerp_module
from rwkv_peft.fused import norm_lerp as lerp_module
from rwkv_peft.fused.norm_ddlerp import norm_ddlerp
from rwkv_peft.fused.norm_lerp import norm_lerp
from rwkv_peft.ops.mix import cpu, cuda, functions, gpu_lerp, last_token, lerp


@pytest.fixture
def kernels(monkeypatch):
    """Run the fused operations' kernels on the CPU; tensors that they should fill begin as NaN."""
    built = running.built(cuda.FAMILY)
    monkeypatch.setattr(cuda.FAMILY, "kernels", lambda device: built)
    for module in (lerp_module, ddlerp_module):
        monkeypatch.setattr(module, "call", running.mix_call)
    return built


def norm_of(weight, bias):
    """The layer norm of two vectors, frozen."""
    norm = nn.LayerNorm(len(weight)).to(weight.dtype).requires_grad_(False)
    norm.weight.copy_(weight), norm.bias.copy_(bias)
    return norm


def plain_lerp(norm, x, last, maa, bounds):
    normal = norm(x)
    return x, last_token(normal, bounds), lerp(normal, last, maa, cu_seqlens=bounds)


def plain_ddlerp(norm, x, last, factors, bounds):
    maa_x, w1, maa, w2, decay_w1 = factors
    normal = norm(x)
    (point,) = lerp(normal, last, maa_x, cu_seqlens=bounds)
    first, *points = lerp(normal, last, maa, torch.tanh(point @ w1), w2, bounds)
    return x, last_token(normal, bounds), torch.tanh(first @ decay_w1), points


def results(function, inputs, dtype, bounds=None, used=None):
    """A function's results, and the gradients of x and last; `used` are the indices of the outputs with gradients."""
    x, last, weight, bias, *rest = (one if one is None else one.to(dtype, copy=True) for one in inputs)
    leaves = [one.requires_grad_() for one in (x, last) if one is not None]
    rest = rest if len(rest) == 1 else [tuple(rest)]
    *outs, points = function(norm_of(weight, bias), x, last, *rest, bounds)
    outs += points
    grads = [randn(*out.shape, seed=7 + i).to(dtype) for i, out in enumerate(outs)]
    chosen = range(len(outs)) if used is None else used
    torch.autograd.backward([outs[i] for i in chosen], [grads[i] for i in chosen])
    return [*outs, *(one.grad for one in leaves)]


def assert_near(found, plain, true):
    for i, (x, low, exact) in enumerate(zip(found, plain, true, strict=True)):
        allowed = 2 * (low.double() - exact).norm() + 2 * torch.finfo(x.dtype).eps * exact.norm()
        assert (x.double() - exact).norm() <= allowed, i


def lerp_inputs(shape, points, sequences=None):
    """Arguments of norm_lerp, in bfloat16."""
    last = None if sequences is None else randn(sequences, shape[2], seed=2)
    inputs = [randn(*shape) + 0.5, last, *(randn(shape[2], seed=i) for i in (3, 4)), randn(points, shape[2])]
    return [x if x is None else x.bfloat16() for x in inputs]


def ddlerp_inputs(B, T, C, rank, sequences=None):
    """Arguments of norm_ddlerp, in bfloat16."""
    w1, decay_w1 = randn(C, 5 * rank) / C**0.5, randn(C, 2 * rank) / C**0.5
    parameters = [*randn(2, C), randn(1, C), w1, randn(5, C), randn(5, rank, C) / rank**0.5, decay_w1]
    inputs = [randn(B, T, C) + 0.5, None if sequences is None else randn(sequences, C), *parameters]
    return [x if x is None else x.bfloat16() for x in inputs]


@pytest.mark.parametrize(
    "shape, lengths, with_last, points",
    [
        ((2, 9, 40), None, True, 2),
        ((2, 9, 40), None, False, 6),
        ((1, 21, 520), (1, 4, 1, 15), True, 2),
        ((1, 21, 40), (6, 15), False, 1),
        ((1, 6, 2080), None, True, 1),
    ],
)
def test_norm_and_points(kernels, shape, lengths, with_last, points, monkeypatch):
    """Sequences begin and end inside strips and at their borders."""
    monkeypatch.setattr(lerp_module, "STRIPS", 4)
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    sequences = shape[0] if lengths is None else len(lengths)
    inputs = lerp_inputs(shape, points, sequences if with_last else None)
    found = results(norm_lerp, inputs, torch.bfloat16, bounds)
    assert_near(found, *(results(plain_lerp, inputs, dtype, bounds) for dtype in (torch.bfloat16, torch.float64)))


@pytest.mark.parametrize("rank, lengths", [(32, None), (64, None), (32, (1, 62, 1, 1, 65)), (64, (64, 63))])
@pytest.mark.parametrize("with_last, groups", [(False, 1), (True, 3)])
def test_norm_and_points_that_depend_on_the_token(kernels, rank, lengths, with_last, groups, monkeypatch):
    """Rows and sequences end inside a tile of tokens, at its end and after it; channels in one group and in several."""
    monkeypatch.setattr(gpu_lerp, "MOST_GROUPS", groups)
    monkeypatch.setattr(lerp_module, "STRIPS", 4)
    B, T, bounds = 2, 65, None
    if lengths is not None:
        B, T, bounds = 1, sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    sequences = B if bounds is None else len(lengths)
    inputs = ddlerp_inputs(B, T, 160, rank, sequences if with_last else None)
    found = results(norm_ddlerp, inputs, torch.bfloat16, bounds)
    assert_near(found, *(results(plain_ddlerp, inputs, dtype, bounds) for dtype in (torch.bfloat16, torch.float64)))


@pytest.mark.parametrize("function", (norm_lerp, norm_ddlerp))
def test_empty_sequences_at_the_end_change_nothing_of_the_others(kernels, function):
    """The last token of an empty sequence is not defined."""
    bounds = torch.tensor([0, 1, 63, 64, 65, 130])
    raised = torch.cat([bounds, torch.tensor([130, 130, 130])])
    inputs = lerp_inputs((1, 130, 64), 2) if function is norm_lerp else ddlerp_inputs(1, 130, 64, 32)
    (_, ends, *one), (_, more_ends, *other) = (
        results(function, inputs, torch.bfloat16, of, used=[2, 3]) for of in (bounds, raised)
    )
    assert torch.equal(more_ends[:5], ends)
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("used", ([0], [1], [2], [3]))
@pytest.mark.parametrize("function", (norm_lerp, norm_ddlerp))
def test_results_that_nobody_uses_count_as_zeros(kernels, function, used):
    inputs = lerp_inputs((1, 5, 64), 2) if function is norm_lerp else ddlerp_inputs(1, 5, 64, 32)
    plain = plain_lerp if function is norm_lerp else plain_ddlerp
    found = results(function, inputs, torch.bfloat16, used=used)[-1]
    low, true = (results(plain, inputs, dtype, used=used)[-1] for dtype in (torch.bfloat16, torch.float64))
    assert_near([found], [low], [true])


def test_gradients_at_any_address_are_read_16_bytes_at_once(kernels, monkeypatch):
    read, call = {}, ddlerp_module.call
    monkeypatch.setattr(ddlerp_module, "call", lambda *rest, **sizes: (read.update(rest[2]), call(*rest, **sizes)))
    x, last, weight, bias, *factors = ddlerp_inputs(1, 3, 64, 32)
    *_, points = norm_ddlerp(norm_of(weight, bias), x.requires_grad_(), last, tuple(factors), None)
    memory = randn(2 + 3 * 64).bfloat16()
    torch.autograd.backward(points, [memory[2:].view(1, 3, 64)] * 4)
    assert all(read[f"grad{i}"].data_ptr() % 16 == 0 for i in range(1, 5)) and x.grad.isfinite().all()


@pytest.mark.parametrize("order", shim.ORDERS[1:])
def test_the_order_of_threads_changes_no_bit(kernels, order, monkeypatch):
    """Nor does the number of tokens that a block takes."""

    def both():
        mixed = results(norm_lerp, lerp_inputs((1, 9, 304), 2, 1), torch.bfloat16)
        return [*mixed, *results(norm_ddlerp, ddlerp_inputs(1, 70, 64, 32, 1), torch.bfloat16)]

    expected = both()
    kernels.set_order(order)
    monkeypatch.setattr(lerp_module, "STRIPS", 2)
    assert all(torch.equal(x, y) for x, y in zip(both(), expected, strict=True))


def test_a_second_derivative_is_refused(kernels):
    x, last, weight, bias, maa = lerp_inputs((1, 5, 64), 2)
    *_, points = norm_lerp(norm_of(weight, bias), x.requires_grad_(), last, maa, None)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(points[0].sum(), x, create_graph=True)


def test_a_shift_of_the_wrong_shape_is_refused():
    x, _, weight, bias, maa = lerp_inputs((3, 5, 64), 2)
    with pytest.raises(ValueError, match=r"shift is \(2, 64\).*\(3, 64\)"):
        norm_lerp(norm_of(weight, bias), x, randn(2, 64), maa, None)


def test_the_kernels_are_launched_where_the_tensors_are(monkeypatch):
    """`call` chooses by the device: here the CPU, which has no such kernel."""
    asked = []
    monkeypatch.setattr(cpu, "call", lambda name, *rest, **sizes: asked.append(name))
    assert lerp_module.call is functions.call
    x, last, weight, bias, maa = lerp_inputs((1, 5, 64), 2)
    norm_lerp(norm_of(weight, bias), x, last, maa, None)
    assert asked == ["norm_lerp_forward"]
