"""wkv7: every backend against the float64 reference, forward and all gradients; a sequence in parts, packed, alone."""

import functools

import pytest
import torch

from rwkv_peft.ops.native import levels
from rwkv_peft.ops.wkv7 import chunked, cpu, wkv7

INPUTS = ("r", "w", "k", "v", "a", "b", "state")
NAMES = ("y", "final state", *(f"g{name}" for name in INPUTS))
BACKENDS = ("chunked", *(f"cpu:{level}" for level in levels.LEVELS))
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (1, 2, 15, 16, 17, 64, 100, 257)
DECAYS = {"usual": (-6.0, 2.0), "none": (-40.0, -20.0), "strong": (6.0, 95.0), "mixed": (-8.0, 8.0)}


def skip_unless_usable(backend):
    """Skip the test if this machine cannot run a backend."""
    name, _, level = backend.partition(":")
    reason = cpu.RECURRENCE.unavailable(level) if name == "cpu" else None
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def random_inputs(B, T, H, N, dtype=torch.float32, decay="usual", with_state=True, sequences=None):
    """([r, w, k, v, a, b, state], [gradient of y, gradient of the final state]), with a and b as the model makes them:
    a direction to remove, and the same times a learning rate."""
    g = torch.Generator().manual_seed(0)
    low, high = DECAYS[decay]
    r, k, v, direction, gy = (torch.randn(B, T, H, N, generator=g) for _ in range(5))
    w = low + (high - low) * torch.rand(B, T, H, N, generator=g)
    direction = torch.nn.functional.normalize(direction, dim=-1)
    rate = torch.rand(B, T, H, N, generator=g)
    state, gfinal = (0.5 * torch.randn(sequences or B, H, N, N, generator=g) for _ in range(2))
    inputs = [x.to(dtype) for x in (r, w, k, v, -direction, direction * rate)] + [state if with_state else None]
    return inputs, [gy.to(dtype), gfinal]


def run(backend, inputs, gradients, dtype=None, cu_seqlens=None):
    """Outputs and gradients, in the order of NAMES; without a state its gradient is left out."""
    leaves = [None if x is None else x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in inputs]
    y, final = wkv7(*leaves, cu_seqlens=cu_seqlens, backend=backend)
    torch.autograd.backward([y, final], [gradients[0].to(y), gradients[1].to(final)])
    return [x.detach() for x in [y, final, *(x.grad for x in leaves if x is not None)]]


@functools.lru_cache(maxsize=64)
def case(*shape, bounds=None, **choices):
    """(inputs, gradients, cu_seqlens, results in float64, results of plain torch in the inputs' dtype)"""
    sequences = None if bounds is None else len(bounds) - 1
    inputs, gradients = random_inputs(*shape, sequences=sequences, **choices)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    truth = run("reference", inputs, gradients, torch.float64, cu_seqlens)
    return inputs, gradients, cu_seqlens, truth, run("reference", inputs, gradients, cu_seqlens=cu_seqlens)


def assert_as_accurate(backend, *shape, **choices):
    """Each result is at most twice as far from float64 as plain torch's, plus a few roundings of the scale."""
    skip_unless_usable(backend)
    inputs, gradients, cu_seqlens, truth, plain = case(*shape, **choices)
    out = run(backend, inputs, gradients, cu_seqlens=cu_seqlens)
    largest = max(t.norm().item() for t in truth)
    for name, o, p, t in zip(NAMES, out, plain, truth, strict=False):
        assert o.dtype == p.dtype, name
        scale = max(t.norm().item(), 1e-2 * largest)  # gw may be a small difference
        error, usual = (((x.double() - t).norm() / scale).item() for x in (o, p))
        assert error <= 2 * usual + 3 * torch.finfo(torch.float32).eps, (name, error, usual)


# Every value of every parameter, in rotation, rather than every combination.
CASES = [
    (T, 1 + i % 2, (1, 3)[(i + j) % 2], (4, 16, 64, 128)[i % 4], dtype, tuple(DECAYS)[(i + j) % 4], (i + j) % 3 > 0)
    for j, dtype in enumerate(DTYPES)
    for i, T in enumerate(LENGTHS)
]


@pytest.mark.parametrize("T, B, H, N, dtype, decay, with_state", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_are_as_accurate_as_plain_torch(backend, T, B, H, N, dtype, decay, with_state):
    assert_as_accurate(backend, B, T, H, N, dtype=dtype, decay=decay, with_state=with_state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decays_at_both_ends(backend, decay, dtype):
    assert_as_accurate(backend, 1, 70, 2, 64, decay=decay, dtype=dtype)


@pytest.mark.parametrize("N", (4, 12, 20, 40, 96))
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_multiple_of_four_is_a_head_size(backend, N):
    assert_as_accurate(backend, 2, 19, 2, N)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_state", (True, False))
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_are_computed_apart(backend, with_state, dtype):
    bounds = (0, 1, 18, 82, 147, 277, 280)
    choices = dict(bounds=bounds, dtype=dtype, with_state=with_state)
    assert_as_accurate(backend, 1, 280, 2, 64, **choices)
    inputs, gradients, cu_seqlens, *_ = case(1, 280, 2, 64, **choices)
    out = run(backend, inputs, gradients, cu_seqlens=cu_seqlens)
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        pieces = [x[:, start:end] for x in inputs[:6]] + [inputs[6][n : n + 1] if with_state else None]
        alone = run(backend, pieces, [gradients[0][:, start:end], gradients[1][n : n + 1]])
        for name, whole, part in zip(NAMES, out, alone):
            whole = whole[n : n + 1] if "state" in name else whole[:, start:end]
            torch.testing.assert_close(whole, part, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-2)


def with_threads(counts, *arguments, **choices):
    """The results of `run` by the CPU's kernel, for each count of threads."""
    skip_unless_usable("cpu")
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            yield run("cpu", *arguments, **choices)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype):
    """Threads share sequences and heads, and each thread computes the same."""
    for name, one, *others in zip(NAMES, *with_threads((1, 2, 5), *random_inputs(2, 130, 3, 64, dtype))):
        assert all(torch.equal(one, other) for other in others), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, bounds", [(64, None), (40, (0, 1, 70, 290)), (128, None)])
def test_threads_share_the_values_of_a_head(N, bounds, dtype):
    """If there are more threads than heads; gradients that sum over the values may round differently."""
    sequences = None if bounds is None else len(bounds) - 1
    inputs, gradients = random_inputs(1, 290, 1, N, dtype, sequences=sequences)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    one, *others = with_threads((1, 2, 8, 9), inputs, gradients, cu_seqlens=cu_seqlens)
    for results in others:
        for name, a, b in zip(NAMES, results, one):
            assert (a - b).norm() <= 10 * torch.finfo(a.dtype).eps * b.norm(), name


@pytest.mark.parametrize("split", (1, 31, 64, 90))
@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_a_sequence_in_two_parts_equals_the_whole(backend, split):
    skip_unless_usable(backend)
    inputs, (gy, gfinal) = random_inputs(2, 100, 2, 64)
    whole = run(backend, inputs, (gy, gfinal))
    leaves = [x.clone().requires_grad_() for x in inputs]
    *pieces, state = leaves
    first, middle = wkv7(*(x[:, :split] for x in pieces), state, backend=backend)
    second, final = wkv7(*(x[:, split:] for x in pieces), middle, backend=backend)
    torch.autograd.backward([torch.cat([first, second], dim=1), final], [gy, gfinal])
    for name, one, two in zip(NAMES, whole, [torch.cat([first, second], dim=1), final, *(x.grad for x in leaves)]):
        assert (one - two.detach()).norm() <= 3e-6 * one.norm(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_at_a_time_equals_a_sequence(backend):
    skip_unless_usable(backend)
    (*inputs, state), _ = random_inputs(2, 9, 3, 64)
    y, final = wkv7(*inputs, state, backend=backend)
    steps = []
    for t in range(9):
        step, state = wkv7(*(x[:, t : t + 1] for x in inputs), state, backend=backend)
        steps.append(step)
    torch.testing.assert_close(torch.cat(steps, 1), y, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


def step_by_step(inputs, S, gy, gfinal):
    """One head's results in the order of NAMES, by the formulas: inputs r w k v a b and gy (T, N), S and gfinal (N,
    N)."""
    r, w, k, v, a, b = inputs
    d = (-(-torch.tensor(0.5, dtype=r.dtype)).exp() * w.sigmoid()).exp()
    states, ys, T = [S], [], len(r)
    for t in range(T):
        states.append(states[t] * d[t] + torch.outer(states[t] @ a[t], b[t]) + torch.outer(v[t], k[t]))
        ys.append(states[t + 1] @ r[t])
    D, gradients = gfinal, []
    for t in reversed(range(T)):
        D = D + torch.outer(gy[t], r[t])
        removed = D @ b[t]  # gradient of S_{t-1} a_t
        gw = (D * states[t]).sum(0) * d[t] * -(-torch.tensor(0.5, dtype=r.dtype)).exp() * w[t].sigmoid()
        gw = gw * (-w[t]).sigmoid()
        written = D.T @ (states[t] @ a[t])
        gradients.append((states[t + 1].T @ gy[t], gw, D.T @ v[t], D @ k[t], states[t].T @ removed, written))
        D = D * d[t] + torch.outer(removed, a[t])
    return [torch.stack(ys), states[T], *(torch.stack(x[::-1]) for x in zip(*gradients)), D]


def test_the_reference_is_the_formula():
    (*inputs, state), (gy, gfinal) = random_inputs(1, 7, 1, 8)
    found = run("reference", (*inputs, state), (gy, gfinal), torch.float64)
    rows, states = [x[0, :, 0].double() for x in inputs], [x[0, 0].double() for x in (state, gfinal)]
    expected = step_by_step(rows, states[0], gy[0, :, 0].double(), states[1])
    for name, one, two in zip(NAMES, found, expected):
        torch.testing.assert_close(one.squeeze(), two, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("bounds", (None, (0, 1, 18, 300, 301, 333)))
def test_the_chunked_form_is_exact(bounds):
    """In float64, because roundings hide nothing there."""
    inputs, gradients, cu_seqlens, truth, _ = case(1, 333, 2, 8, decay="mixed", bounds=bounds)
    inputs, (gy, gfinal) = [x.double() for x in inputs], (x.double() for x in gradients)
    y, final, checkpoints = chunked.RECURRENCE.forward(*inputs, cu_seqlens, save=True)
    found = [y, final, *chunked.RECURRENCE.backward(*inputs, cu_seqlens, checkpoints, gy, gfinal)]
    for name, one, two in zip(NAMES, found, truth):
        assert (one - two).norm() <= 1e-13 * two.norm(), name
