"""wkv6: every backend against the float64 reference, forward and all gradients; the operator's contract with torch."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_peft.ops.native import levels
from rwkv_peft.ops.recurrence import checks
from rwkv_peft.ops.wkv6 import backends, chunked, cpu, wkv6

NAMES = ("y", "final state", "gr", "gk", "gv", "gw", "gu", "gstate")
KERNELS = ("chunked", *(f"cpu:{level}" for level in levels.LEVELS), "cuda")
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (1, 2, 15, 16, 17, 64, 100, 257)
DECAYS = {"usual": (-6.0, 1.0), "none": (-40.0, -20.0), "total": (4.0, 95.0), "mixed": (-20.0, 6.0)}


@functools.cache
def why_not(backend):
    """The reason why this machine cannot run a backend, or None."""
    name, _, level = backend.partition(":")
    return cpu.RECURRENCE.unavailable(level) if name == "cpu" else backends()[name]


def device_of(backend):
    if why_not(backend) is not None:
        pytest.skip(f"{backend}: {why_not(backend)}")
    return "cuda" if backend == "cuda" else "cpu"


def random_inputs(B, T, H, N, dtype=torch.float32, decay="usual", with_state=True, sequences=None):
    """([r, k, v, w, u, state], [gradient of y, gradient of the final state])"""
    g = torch.Generator().manual_seed(0)
    low, high = DECAYS[decay]
    r, k, v, gy = (0.5 * torch.randn(B, T, H, N, generator=g) for _ in range(4))
    w = low + (high - low) * torch.rand(B, T, H, N, generator=g)
    u = 0.5 * torch.randn(H, N, generator=g)
    state, gfinal = (0.3 * torch.randn(sequences or B, H, N, N, generator=g) for _ in range(2))
    inputs = [x.to(dtype) for x in (r, k, v, w)] + [u, state if with_state else None]
    return inputs, [gy.to(dtype), gfinal]


def run(backend, inputs, gradients, dtype=None, device="cpu", cu_seqlens=None):
    """Outputs and gradients, in the order of NAMES, on the CPU; without a state its gradient is left out."""
    leaves = [
        None if x is None else x.to(device, dtype or x.dtype).requires_grad_()
        for x in [None if x is None else x.detach().clone() for x in inputs]
    ]
    bounds = None if cu_seqlens is None else cu_seqlens.to(device)
    y, final = wkv6(*leaves, cu_seqlens=bounds, backend=backend)
    torch.autograd.backward([y, final], [gradients[0].to(y), gradients[1].to(final)])
    return [x.detach().cpu() for x in [y, final, *(x.grad for x in leaves if x is not None)]]


def error(x, truth, scale):
    return ((x.double() - truth).norm() / scale).item()


def assert_as_accurate(backend, inputs, gradients, cu_seqlens=None):
    """Each result is at most twice as far from float64 as the plain float32 computation, plus two roundings."""
    device = device_of(backend)
    truth = run("reference", inputs, gradients, torch.float64, cu_seqlens=cu_seqlens)
    plain = run("reference", inputs, gradients, cu_seqlens=cu_seqlens)
    out = run(backend, inputs, gradients, device=device, cu_seqlens=cu_seqlens)
    dtype = inputs[0].dtype
    # The tensor cores' products of a GPU take bfloat16 operands: its plain form rounds them all.
    rounding = torch.finfo(torch.bfloat16 if backend == "cuda" else torch.float32).eps
    largest = max(t.norm().item() for t in truth)
    for name, o, p, t in zip(NAMES, out, plain, truth, strict=False):
        assert o.dtype == p.dtype, name
        scale = max(t.norm().item(), 1e-3 * largest)
        allowed = 2 * error(p, t, scale) + 2 * rounding
        assert error(o, t, scale) <= allowed, (name, error(o, t, scale), allowed, dtype)


# Every value of every parameter, in rotation, rather than every combination.
CASES = [
    (
        T,
        1 + i % 3,
        1 + i % 4,
        (8, 32, 64, 128)[i % 4],
        DTYPES[(i + i // 4) % 2],
        tuple(DECAYS)[(i + i // 2) % 4],
        i % 3 == 0,
    )
    for i, T in enumerate(LENGTHS)
]


@pytest.mark.parametrize("T, B, H, N, dtype, decay, with_state", CASES)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_are_as_accurate_as_plain_torch(backend, T, B, H, N, dtype, decay, with_state):
    if T > 64 and N == 128:
        B = H = 1  # the reference is slow
    assert_as_accurate(backend, *random_inputs(B, T, H, N, dtype, decay, with_state))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("backend", KERNELS)
def test_decays_that_underflow_or_keep_everything(backend, decay):
    assert_as_accurate(backend, *random_inputs(1, 70, 2, 64, decay=decay))


@pytest.mark.parametrize("N", (4, 12, 20, 40, 96))
@pytest.mark.parametrize("backend", KERNELS)
def test_any_multiple_of_four_is_a_head_size(backend, N):
    assert_as_accurate(backend, *random_inputs(2, 19, 2, N))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_packed_sequences_are_computed_apart(backend, dtype):
    bounds = torch.tensor([0, 1, 18, 82, 147, 277, 280], dtype=torch.int32)
    inputs, gradients = random_inputs(1, 280, 2, 64, dtype, sequences=6)
    assert_as_accurate(backend, inputs, gradients, bounds)
    out = run(backend, inputs, gradients, device=device_of(backend), cu_seqlens=bounds)
    for n, (start, end) in enumerate(zip(bounds.tolist(), bounds.tolist()[1:])):
        pieces = [x[:, start:end] for x in inputs[:4]] + [inputs[4], inputs[5][n : n + 1]]
        alone = run(backend, pieces, [gradients[0][:, start:end], gradients[1][n : n + 1]], device=device_of(backend))
        for i in (0, 2, 3, 4, 5):
            assert torch.equal(out[i][:, start:end], alone[i]), NAMES[i]
        assert torch.equal(out[1][n], alone[1][0])


@pytest.mark.parametrize("split", (1, 31, 64, 90))
@pytest.mark.parametrize("backend", ("reference", *KERNELS))
def test_a_sequence_in_two_parts_equals_the_whole(backend, split):
    device = device_of(backend) if backend != "reference" else "cpu"
    inputs, (gy, gfinal) = random_inputs(2, 100, 2, 64)
    whole = run(backend, inputs, (gy, gfinal), device=device)
    leaves = [x.to(device).clone().requires_grad_() for x in inputs]
    r, k, v, w, u, state = leaves
    first, middle = wkv6(r[:, :split], k[:, :split], v[:, :split], w[:, :split], u, state, backend=backend)
    second, final = wkv6(r[:, split:], k[:, split:], v[:, split:], w[:, split:], u, middle, backend=backend)
    y = torch.cat([first, second], dim=1)
    torch.autograd.backward([y, final], [gy.to(y), gfinal.to(final)])
    tolerance = 1e-2 if backend == "cuda" else 3e-6
    for name, a, b in zip(NAMES, whole, [y, final, *(x.grad for x in leaves)]):
        assert (a - b.detach().cpu()).norm() <= tolerance * a.norm(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", (1, 3))
def test_threads_share_the_values_of_a_single_head(heads, dtype):
    """One head is split over its value columns when there are more threads than heads."""
    inputs, gradients = random_inputs(1, 130, heads, 64, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run("cpu", inputs, gradients)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            for name, a, b in zip(NAMES, run("cpu", inputs, gradients), alone):
                assert (a - b).norm() <= 10 * torch.finfo(a.dtype).eps * b.norm(), (name, threads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_step_at_a_time_equals_a_sequence(backend):
    device = device_of(backend)
    inputs, _ = random_inputs(2, 9, 3, 64)
    r, k, v, w, u, state = (x.to(device) for x in inputs)
    y, final = wkv6(r, k, v, w, u, state, backend=backend)
    steps = []
    with torch.no_grad():
        for t in range(9):
            step, state = wkv6(*(x[:, t : t + 1] for x in (r, k, v, w)), u, state, backend=backend)
            steps.append(step)
    tolerance = 2e-2 if backend == "cuda" else 1e-5
    torch.testing.assert_close(torch.cat(steps, 1), y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state, final, rtol=tolerance, atol=tolerance)


def test_levels_for_bfloat16_need_a_compiler_that_knows_them(monkeypatch):
    best = levels.best_level.__wrapped__
    if best() != "avx512bf16":
        pytest.skip("this machine's best level is another")
    monkeypatch.setattr(levels, "AVX512BF16_FLAGS", ("-mno-such-instructions",))
    assert best() == "avx512"


def test_a_tensor_that_passed_is_not_read_again_until_it_changes():
    """As on a GPU, for which reading waits: a mark replaces the reading, also in a converted copy."""
    bounds = torch.tensor([0, 99], dtype=torch.int32)  # would not pass
    bounds._checked_bounds = 6, bounds._version
    checks.check_bounds("wkv6", checks.as_int64(bounds, 6), 6)
    for changed_bounds, tokens in ((bounds, 7), (bounds.add_(0), 6)):
        with pytest.raises(ValueError, match="it must start at 0"):
            checks.check_bounds("wkv6", checks.as_int64(changed_bounds, tokens), tokens)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_what_was_vouched_for_is_known_without_a_reading(dtype):
    """The meta device has no values to read."""
    bounds = torch.tensor([0, 3, 6], dtype=dtype)
    copy = bounds.to("meta")
    checks.vouch(copy, bounds, 6)
    assert checks.bounds_on_host(checks.as_int64(copy, 6)) == [0, 3, 6]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("bounds", (None, (0, 1, 18, 300, 301, 333)))
def test_the_chunked_form_is_exact(bounds, decay):
    """In float64, because roundings hide nothing there: nothing is divided, and no decay is capped."""
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    inputs, gradients = random_inputs(1, 333, 2, 8, decay=decay, sequences=None if bounds is None else 5)
    truth = run("reference", inputs, gradients, torch.float64, cu_seqlens=cu_seqlens)
    inputs, (gy, gfinal) = [x.double() for x in inputs], (x.double() for x in gradients)
    y, final, checkpoints = chunked.RECURRENCE.forward(*inputs, cu_seqlens, save=True)
    found = [y, final, *chunked.RECURRENCE.backward(*inputs, cu_seqlens, checkpoints, gy, gfinal)]
    for name, one, two in zip(NAMES, found, truth, strict=True):
        assert (one - two).norm() <= 1e-14 * two.norm(), name


class Operations(TorchDispatchMode):
    """Counts the operations within it, without views."""

    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        self.count += not operation.is_view
        return result


def test_the_chunked_form_takes_few_operations_a_token_and_keeps_little():
    """Each operation is a launch on a GPU; a step at a time takes 30 for each token. Beside its inputs the form keeps a
    state for every 1,024 tokens of one row, or for every 128 tokens of each of eight rows."""
    counts = {}
    for T in (1024, 2048):
        inputs, gradients = random_inputs(1, T, 1, 64)
        with Operations() as operations:
            run("chunked", inputs, gradients)
        counts[T] = operations.count
    assert 0 < counts[2048] - counts[1024] < 512  # half of one a token, forward and backward
    for B, tokens in ((1, 1024), (8, 128), (64, 128)):
        assert chunked.RECURRENCE.checkpoint_count(torch.empty(B, 4096, 1, 64, device="meta"), B) == B * 4096 // tokens
