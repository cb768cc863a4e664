"""Every backend of every recurrence against the float64 reference: results and all gradients, sequences in parts,
packed and alone, and threads."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch

from cuda_shim import cases as wkv6_cases
from cuda_shim import wkv7_cases
from rwkv_peft.ops import wkv6, wkv7
from rwkv_peft.ops.native import cpu

CPU = ("chunked", *(f"cpu:{level}" for level in cpu.LEVELS))
# A family's operation, cases, and names of decays there; the least scale of a small result in that of the largest, in
# float32 and in float64; roundings that are allowed; how near packed sequences come to those alone, and the chunked
# form to float64.
FIELDS = ("op", "cases", "decays", "least", "tiny", "roundings", "alone", "exact")
OF = {
    "wkv6": (wkv6, wkv6_cases, ("ordinary", "none", "all", "mix"), 1e-3, 0, 2, 0, 1e-14),
    "wkv7": (wkv7, wkv7_cases, tuple(wkv7_cases.DECAYS), 1e-2, 1e-2, 3, 1e-4, 1e-13),
}
OF = {name: SimpleNamespace(**dict(zip(FIELDS, values))) for name, values in OF.items()}
BACKENDS = [("wkv6", backend) for backend in (*CPU, "cuda")] + [("wkv7", backend) for backend in CPU]
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (1, 2, 15, 16, 17, 64, 100, 257)
PACKED = (1, 17, 64, 65, 130, 3)


@pytest.fixture(params=OF)
def of(request):
    return OF[request.param]


@pytest.fixture(params=BACKENDS, ids=lambda pair: "-".join(pair))
def pair(request):
    """A family and one of its backends that this machine can run."""
    family, backend = request.param
    name, _, level = backend.partition(":")
    op = OF[family].op
    reason = op.cpu.RECURRENCE.unavailable(level) if name == "cpu" else op.backends()[name]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return family, backend


def forward(of, backend, *inputs):
    """y and the final state on the backend's device."""
    device = "cuda" if backend == "cuda" else "cpu"
    given = [x if x is None else x.to(device) for x in inputs]
    return getattr(of.op, of.op.__name__.rpartition(".")[2])(*given, backend=backend)


def results(of, backend, case, dtype=None):
    """{name: output or gradient}; without a state its gradient is left out."""
    leaves = [None if x is None else x.detach().to(dtype or x.dtype, copy=True) for x in (*case.inputs, case.state)]
    leaves = [None if x is None else x.requires_grad_() for x in leaves]
    y, final = forward(of, backend, *leaves, case.cu_seqlens)
    gfinal = torch.ones_like(final) if case.gfinal is None else case.gfinal.to(final)
    torch.autograd.backward([y, final], [case.gy.to(y), gfinal])
    found = [y, final, *(x.grad for x in leaves if x is not None)]
    return dict(zip(of.cases.RESULTS, (x.detach().cpu() for x in found)))


@functools.lru_cache(maxsize=64)
def made(family, *shape, dtype=torch.float32, **choices):
    """(a case, its results in float64, those of plain torch in its dtype)"""
    case = OF[family].cases.make_case(shape, dtype, **choices)
    if case.cu_seqlens is not None:
        case = dataclasses.replace(case, cu_seqlens=case.cu_seqlens.int())
    return case, results(OF[family], "reference", case, torch.float64), results(OF[family], "reference", case)


def assert_as_accurate(pair, *shape, **choices):
    """Each result is at most twice as far from float64 as plain torch's, plus a few roundings of the scale."""
    family, backend = pair
    of = OF[family]
    case, truth, plain = made(family, *shape, **choices)
    # The tensor cores' products of a GPU take bfloat16 operands: its plain form rounds them all.
    rounding = of.roundings * torch.finfo(torch.bfloat16 if backend == "cuda" else torch.float32).eps
    largest = max(x.norm().item() for x in truth.values())
    found = results(of, backend, case)
    assert found.keys() == truth.keys()
    for name, x in found.items():
        assert x.dtype == plain[name].dtype, name
        scale = max(truth[name].norm().item(), of.least * largest)  # gw may be a small difference
        error, usual = (((y.double() - truth[name]).norm() / scale).item() for y in (x, plain[name]))
        assert error <= 2 * usual + rounding, (name, error, usual)
    return case, found


# Every value of every parameter, in rotation, rather than every combination.
CASES = [
    (T, 1 + i % 2, (1, 3)[(i + j) % 2], (4, 16, 64, 128)[i % 4], dtype, (i + j) % 4, (i + j) % 3 > 0)
    for j, dtype in enumerate(DTYPES)
    for i, T in enumerate(LENGTHS)
]


@pytest.mark.parametrize("T, B, H, N, dtype, decay, with_state", CASES)
def test_backends_are_as_accurate_as_plain_torch(pair, T, B, H, N, dtype, decay, with_state):
    B, H = (1, 1) if T > 64 and N == 128 else (B, H)  # the reference is slow
    assert_as_accurate(pair, B, T, H, N, dtype=dtype, decay=OF[pair[0]].decays[decay], with_state=with_state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", range(4))
def test_decays_that_underflow_or_keep_everything(pair, decay, dtype):
    assert_as_accurate(pair, 1, 70, 2, 64, decay=OF[pair[0]].decays[decay], dtype=dtype)


@pytest.mark.parametrize("N", (4, 12, 20, 40, 96))
def test_any_multiple_of_four_is_a_head_size(pair, N):
    assert_as_accurate(pair, 2, 19, 2, N)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_state", (True, False))
def test_packed_sequences_are_computed_apart(pair, with_state, dtype):
    case, found = assert_as_accurate(pair, 1, 280, 2, 64, lengths=PACKED, dtype=dtype, with_state=with_state)
    family, backend = pair
    rows = {f.name for f in dataclasses.fields(case)} - {"u", "state", "gfinal", "cu_seqlens"}
    near = OF[family].alone
    for n, (start, end) in enumerate(zip(case.cu_seqlens, case.cu_seqlens[1:])):
        cut = {name: getattr(case, name)[:, start:end] for name in rows} | {"cu_seqlens": None}
        states = {name: getattr(case, name)[n : n + 1] for name in ("state", "gfinal") if with_state}
        for name, alone in results(OF[family], backend, dataclasses.replace(case, **cut, **states)).items():
            if name != "gu":  # which sums over all sequences
                whole = found[name][n : n + 1] if "state" in name else found[name][:, start:end]
                torch.testing.assert_close(whole, alone, rtol=near, atol=near * (1 if dtype == DTYPES[0] else 100))


@pytest.mark.parametrize("split", (1, 31, 64, 90))
def test_a_sequence_in_two_parts_equals_the_whole(pair, split):
    family, backend = pair
    of, (case, _, _) = OF[family], made(family, 2, 100, 2, 64)
    leaves = [x.detach().clone().requires_grad_() for x in (*case.inputs, case.state)]
    *inputs, state = leaves
    parts = [[x[:, span] if x.ndim == 4 else x for x in inputs] for span in (slice(split), slice(split, None))]
    first, middle = forward(of, backend, *parts[0], state)
    second, final = forward(of, backend, *parts[1], middle)
    y = torch.cat([first, second], dim=1)
    torch.autograd.backward([y, final], [case.gy.to(y), case.gfinal.to(final)])
    tolerance = 1e-2 if backend == "cuda" else 3e-6
    for (name, one), two in zip(results(of, backend, case).items(), [y, final, *(x.grad for x in leaves)]):
        assert (one - two.detach().cpu()).norm() <= tolerance * one.norm(), name


@torch.no_grad()
def test_a_step_at_a_time_equals_a_sequence(pair):
    of, backend = OF[pair[0]], pair[1]
    case = of.cases.make_case((2, 9, 3, 64), torch.float32)
    y, final = forward(of, backend, *case.inputs, case.state)
    steps, state = [], case.state
    for t in range(9):
        inputs = [x[:, t : t + 1] if x.ndim == 4 else x for x in case.inputs]
        step, state = forward(of, backend, *inputs, state)
        steps.append(step)
    tolerance = 2e-2 if backend == "cuda" else 1e-5
    torch.testing.assert_close(torch.cat(steps, 1), y, rtol=tolerance, atol=2 * tolerance)
    torch.testing.assert_close(state, final, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "B, H, N, lengths", [(1, 1, 64, None), (2, 3, 64, None), (1, 1, 40, (1, 69, 60)), (1, 1, 128, None)]
)
def test_threads_share_sequences_heads_and_the_values_of_a_head(of, B, H, N, lengths, dtype):
    """Gradients that sum over a head's values may round differently, because several threads have a part of them."""
    if of.op.backends()["cpu"] is not None:
        pytest.skip(of.op.backends()["cpu"])
    case, before, found = of.cases.make_case((B, 130, H, N), dtype, lengths=lengths), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 9):
            torch.set_num_threads(count)
            found.append(results(of, "cpu", case))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for name, one in found[0].items():
            bound = 10 * torch.finfo(one.dtype).eps * one.norm()
            assert (others[name] - one).norm() <= bound, name


@pytest.mark.parametrize("decay", range(4))
@pytest.mark.parametrize("lengths", (None, (1, 17, 282, 1, 32)))
def test_the_chunked_form_is_exact(of, lengths, decay):
    """Nothing is divided, and no decay is capped; in float64, because roundings hide nothing there."""
    case = of.cases.make_case((1, 333, 2, 8), torch.float64, decay=of.decays[decay], lengths=lengths)
    inputs = [x.double() for x in (*case.inputs, case.state)]
    gy, gfinal, recurrence = case.gy, case.gfinal.double(), of.op.chunked.RECURRENCE
    y, final, checkpoints = recurrence.forward(*inputs, case.cu_seqlens, save=True)
    found = [y, final, *recurrence.backward(*inputs, case.cu_seqlens, checkpoints, gy, gfinal)]
    true = results(of, "reference", case, torch.float64)
    largest = max(x.norm() for x in true.values())
    for (name, truth), x in zip(true.items(), found, strict=True):
        assert (x - truth).norm() <= of.exact * max(truth.norm(), of.tiny * largest), name
