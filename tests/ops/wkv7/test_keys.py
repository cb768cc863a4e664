"""The chunked kernels that make their keys themselves, run on the CPU through tests/cuda_shim, against float64: every
result and every gradient."""

import dataclasses

import pytest
import torch

from cuda_shim import shim
from cuda_shim import wkv7_cases as cases
from cuda_shim.cases import error, rms
from cuda_shim.running import shim_kernels

pytestmark = pytest.mark.usefixtures("quiet_torch")

# B, T or the lengths of packed sequences, and what else makes a case
KINDS = [
    (2, 17, dict(decay="mixed")),
    (1, 1, dict(with_state=False)),
    (1, 16, dict(decay="strong", with_bonus=False)),
    (1, [1, 16, 33, 25], dict(decay="usual")),
    (1, 100, dict(decay="none", with_state=False)),
    (1, 40, dict(decay="none", repeated=True)),
]
SPLIT_KINDS = [
    (2, 130, dict(decay="mixed")),
    (1, [1, 130, 64, 65], dict(decay="usual", with_bonus=False)),
    (1, 129, dict(decay="none", repeated=True, with_state=False)),
]


@pytest.fixture(scope="module")
def kernels():
    return shim_kernels("wkv7")


def made_of(B, T, kinds, H=2):
    lengths = T if isinstance(T, list) else None
    return cases.make_keys_case(B, sum(T) if lengths else T, H, lengths=lengths, **kinds)


def named(results):
    return dict(zip(cases.KEYS_RESULTS, results))


def replaced(made, **tensors):
    """A KeysCase with other tensors of its case."""
    return dataclasses.replace(made, case=dataclasses.replace(made.case, **tensors))


@pytest.mark.parametrize("B, T, kinds, group", [(*kind, 0) for kind in KINDS] + [(*kind, 64) for kind in SPLIT_KINDS])
def test_every_result_is_as_exact_as_plain_torch(kernels, B, T, kinds, group):
    made = made_of(B, T, kinds, H=1 if group else 2)
    ours = named(cases.run_keys(kernels, made, group))
    true, plain = (named(cases.keys_in(made, dtype)) for dtype in (torch.float64, torch.bfloat16))
    assert ours.keys() == true.keys()
    for name, x in ours.items():
        assert x.shape == true[name].shape
        bound = 2 * error(plain[name], true[name]) + 32 * torch.finfo(torch.float32).eps * rms(true[name])
        assert error(x, true[name]) <= bound, name


@pytest.mark.parametrize("group", [0, 64])
def test_the_order_of_the_threads_does_not_matter(kernels, group):
    made = made_of(1, 100, dict(), H=1)
    expected = cases.run_keys(kernels, made, group)
    try:
        for order in shim.ORDERS[1:]:
            kernels.set_order(order)
            for x, y in zip(cases.run_keys(kernels, made, group), expected, strict=True):
                assert torch.equal(x, y), order
    finally:
        kernels.set_order(shim.ORDERS[0])


@pytest.mark.parametrize("group", [0, 64])
def test_nothing_is_read_before_it_is_written(kernels, group):
    """Results and tensors between kernels begin as NaN, as shared memory does; one sequence has no tokens."""
    made = made_of(1, [1, 0, 130, 4], dict(), H=1)
    torch.use_deterministic_algorithms(True)
    try:
        results = cases.run_keys(kernels, made, group)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(results[1][1], made.case.state[1]) and torch.equal(results[-1][1], made.case.gfinal[1])
    for x, expected in zip(results, cases.run_keys(kernels, made, group), strict=True):
        assert torch.equal(x, expected) and x.isfinite().all()


@pytest.mark.parametrize("length, largest", [(0.0, 10), (1e-13, 1e13)])
def test_a_key_without_length_is_divided_by_the_least(kernels, length, largest):
    """Its gradient is divided by the least length, too, without a term for the length's own gradient."""
    made, at = made_of(1, 20, dict(with_state=False)), (0, torch.tensor([3, 17]), 1)
    k = made.case.k.clone()
    k[at] = length * torch.sign(k[at])
    made = replaced(made, k=k)
    ours, true = named(cases.run_keys(kernels, made)), named(cases.keys_in(made, torch.float64))
    assert largest / 1e3 < true["gk"][at].abs().max() < largest
    assert (ours["gk"][at] - true["gk"][at]).norm() < 0.02 * true["gk"][at].norm()
    for name in ("gk", "glow"):
        for x in (ours, true):
            x[name][at] = 0
    assert all((x - true[name]).norm() <= 0.02 * true[name].norm() for name, x in ours.items())


def test_a_gradient_has_nothing_along_its_key(kernels):
    """A normalized key does not depend on k's length: if k has no other use, k gk sums to almost nothing."""
    made = made_of(1, 33, dict(with_bonus=False))
    made = dataclasses.replace(made, k_k=torch.ones_like(made.k_k))
    made = replaced(made, v=torch.zeros_like(made.case.v))
    gk, k = (x.double() for x in (named(cases.run_keys(kernels, made))["gk"], made.case.k))
    assert ((gk * k).sum(-1).abs() < 0.03 * gk.norm(dim=-1) * k.norm(dim=-1)).all() and gk.norm() > 0


@pytest.mark.parametrize("name", ["k", "low"])
def test_a_nan_is_not_hidden(kernels, name):
    made = made_of(1, 40, dict(), H=1)
    poisoned = (made.low if name == "low" else made.case.k).clone()
    poisoned[0, 20, 0, 7] = float("nan")
    made = dataclasses.replace(made, low=poisoned) if name == "low" else replaced(made, k=poisoned)
    y, final, *_ = cases.run_keys(kernels, made)
    assert not y[0, :16].isnan().any() and y[0, 20:].isnan().any() and final.isnan().any()


def test_inputs_off_the_16_byte_grid(kernels):
    made = made_of(1, 20, dict(), H=1)
    storage = torch.zeros(made.low.numel() + 1, dtype=torch.bfloat16)
    storage[1:] = made.low.flatten()
    shifted = dataclasses.replace(made, low=storage[1:].view(made.low.shape))
    assert shifted.low.data_ptr() % 16 != 0
    for x, expected in zip(cases.run_keys(kernels, shifted), cases.run_keys(kernels, made), strict=True):
        assert torch.equal(x, expected)
