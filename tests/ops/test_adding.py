"""A product that adds a residual itself, as on a GPU: the sum and all gradients, and what it keeps for backward."""

import pytest
import torch

from rwkv_peft.ops import adding

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.fixture
def inside(monkeypatch):
    """A CPU's products add the residual, as a GPU's do."""
    monkeypatch.setattr(adding, "inside_product", lambda *_: True)


def tensors(dtype, shape=(2, 5)):
    generator = torch.Generator().manual_seed(0)
    sizes = (*shape, 24), (16, 24), (*shape, 16)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def results(function, inputs, wanted=(True, True, True)):
    """What a function makes of copies of x, weight and residual, and the gradients of those that are wanted."""
    leaves = [x.detach().clone().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)]
    y = function(*leaves)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return [y.detach(), *(x.grad for x, w in zip(leaves, wanted, strict=True) if w)]


def plain(x, weight, residual):
    return x @ weight.t() + residual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 5)], ids=str)
def test_the_sum_and_all_gradients(inside, dtype, shape):
    inputs = tensors(dtype, shape)
    found, low = results(adding.linear, inputs), results(plain, inputs)
    for x, y, true in zip(found, low, results(plain, [x.double() for x in inputs]), strict=True):
        assert x.dtype == dtype and x.shape == true.shape
        allowed = 2 * (y.double() - true).norm() + torch.finfo(dtype).eps * true.norm()
        assert (x.double() - true).norm() <= allowed


def test_without_gradients(inside):
    x, weight, residual = tensors(torch.float64)
    weight.requires_grad_()
    with torch.no_grad():
        y = adding.linear(x, weight, residual)
    assert torch.equal(y, adding.linear(x, weight, residual)) and not y.requires_grad


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_any_of_them_may_train(inside, wanted):
    inputs = tensors(torch.float64)
    for x, true in zip(results(adding.linear, inputs, wanted), results(plain, inputs, wanted), strict=True):
        torch.testing.assert_close(x, true)


def test_second_derivatives(inside):
    x, weight, residual = (x.requires_grad_() for x in tensors(torch.float64, (3,)))
    assert torch.autograd.gradgradcheck(adding.linear, (x, weight, residual))


def test_the_residuals_gradient_is_that_of_the_sum(inside):
    """No pass over it is made, and what autograd adds to one of the two leaves the other."""
    x, weight, residual = tensors(torch.float64)
    begun = residual.requires_grad_() * 1
    middle = adding.linear(x, weight, begun)
    g, seen = torch.ones_like(residual), []
    begun.register_hook(seen.append)
    (middle + 0).backward(g)
    assert seen[0].data_ptr() == g.data_ptr()
    residual.grad = None
    begun = residual * 1
    middle = adding.linear(x, weight, begun)
    middle.retain_grad()
    torch.autograd.backward([middle, begun], [g, 2 * g])  # begun has two users, whose gradients are added up
    assert torch.equal(middle.grad, torch.ones_like(g)) and torch.equal(residual.grad, 3 * torch.ones_like(g))


def test_backward_reads_the_weights_current_storage(inside):
    """ZeRO-3 frees a parameter's storage after forward and fills another before backward."""
    x, weight, residual = tensors(torch.float64)
    expected = results(adding.linear, (x, weight, residual), (True, False, True))
    parameter = torch.nn.Parameter(weight.clone(), requires_grad=False)
    x.requires_grad_()
    y = adding.linear(x, parameter, residual)
    parameter.data = torch.empty(0, dtype=weight.dtype)
    parameter.data = weight.clone()
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    assert torch.equal(x.grad, expected[1])


def test_a_cpu_adds_afterwards_and_so_does_a_product_of_another_dtype(monkeypatch):
    x, _, residual = tensors(torch.bfloat16)
    on_gpu = x.to("meta"), residual.to("meta")
    assert not adding.inside_product(x, residual)
    assert adding.inside_product(*on_gpu)
    assert not adding.inside_product(on_gpu[0], on_gpu[1].float())
    monkeypatch.setattr(adding, "autocasts", lambda _: True)
    assert not adding.inside_product(*on_gpu)


def test_autocast_does_not_round_the_residual():
    x, weight, residual = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = adding.linear(x, weight, residual)
        assert torch.equal(y, torch.nn.functional.linear(x, weight) + residual) and y.dtype == torch.float32
        assert adding.autocasts(x)
    assert not adding.autocasts(x)


def test_compiles_into_one_graph(inside):
    inputs = tensors(torch.float64)
    compiled = torch.compile(adding.linear, backend="aot_eager", fullgraph=True)
    for x, y in zip(results(compiled, inputs), results(adding.linear, inputs), strict=True):
        torch.testing.assert_close(x, y)
