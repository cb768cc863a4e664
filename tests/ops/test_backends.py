"""Every backend of every recurrence against the float64 reference: results and all gradients, sequences in parts,
packed and alone, and threads; and the references against their formulas."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch

from cuda_shim.cases import CASES
from rwkv_peft.ops.native import cpu

CPU = ("chunked", *(f"cpu:{level}" for level in cpu.LEVELS))
# The least scale of a small result in that of the largest, in float32 and in float64; roundings that are allowed; how
# near packed sequences come to those alone, and the chunked form to float64.
LIMITS = {
    "wkv6": SimpleNamespace(least=1e-3, tiny=0, roundings=2, alone=0, exact=1e-14),
    "wkv7": SimpleNamespace(least=1e-2, tiny=1e-2, roundings=3, alone=1e-4, exact=1e-13),
}
BACKENDS = [("wkv6", backend) for backend in (*CPU, "cuda")] + [("wkv7", backend) for backend in CPU]
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (1, 2, 15, 16, 17, 64, 100, 257)
PACKED = (1, 17, 64, 65, 130, 3)


@pytest.fixture(params=BACKENDS, ids=lambda pair: "-".join(pair))
def pair(request):
    """A recurrence and one of its backends that this machine can run."""
    op, backend = request.param
    name, _, level = backend.partition(":")
    if reason := CASES[op].recurrence.table[name].unavailable(level):
        pytest.skip(f"{backend}: {reason}")
    return op, backend


def forward(op, backend, *inputs):
    """y and the final state on the backend's device."""
    device = "cuda" if backend == "cuda" else "cpu"
    *inputs, state, bounds = [x if x is None else x.to(device) for x in inputs]
    return CASES[op].recurrence.compute(inputs, state, bounds, backend)


def results(op, backend, case, dtype=None):
    """{name: output or gradient}; without a state its gradient is left out."""
    leaves = [None if x is None else x.detach().to(dtype or x.dtype, copy=True) for x in (*case.inputs, case.state)]
    leaves = [None if x is None else x.requires_grad_() for x in leaves]
    y, final = forward(op, backend, *leaves, case.cu_seqlens)
    gfinal = torch.ones_like(final) if case.gfinal is None else case.gfinal.to(final)
    torch.autograd.backward([y, final], [case.gy.to(y), gfinal])
    found = [y, final, *(x.grad for x in leaves if x is not None)]
    return dict(zip(CASES[op].results, (x.detach().cpu() for x in found)))


@functools.lru_cache(maxsize=64)
def made(op, *shape, dtype=torch.float32, **choices):
    """(a case, its results in float64, those of plain torch in its dtype)"""
    case = CASES[op].make(shape, dtype, **choices)
    if case.cu_seqlens is not None:
        case = dataclasses.replace(case, cu_seqlens=case.cu_seqlens.int())
    return case, results(op, "reference", case, torch.float64), results(op, "reference", case)


def assert_as_accurate(pair, *shape, **choices):
    """Each result is at most twice as far from float64 as plain torch's, plus a few roundings of the scale."""
    op, backend = pair
    case, truth, plain = made(op, *shape, **choices)
    # The tensor cores' products of a GPU take bfloat16 operands: its plain form rounds them all.
    rounding = LIMITS[op].roundings * torch.finfo(torch.bfloat16 if backend == "cuda" else torch.float32).eps
    largest = max(x.norm().item() for x in truth.values())
    found = results(op, backend, case)
    assert found.keys() == truth.keys()
    for name, x in found.items():
        assert x.dtype == plain[name].dtype, name
        scale = max(truth[name].norm().item(), LIMITS[op].least * largest)  # gw may be a small difference
        error, usual = (((y.double() - truth[name]).norm() / scale).item() for y in (x, plain[name]))
        assert error <= 2 * usual + rounding, (name, error, usual)
    return case, found


# Every value of every parameter, in rotation, rather than every combination.
SHAPES = [
    (T, 1 + i % 2, (1, 3)[(i + j) % 2], (4, 16, 64, 128)[i % 4], dtype, (i + j) % 4, (i + j) % 3 > 0)
    for j, dtype in enumerate(DTYPES)
    for i, T in enumerate(LENGTHS)
]
SHAPES += [(70, 1, 2, 64, dtype, decay, True) for dtype in DTYPES for decay in range(4)]  # they underflow, or keep all
SHAPES += [(19, 2, 2, N, DTYPES[0], 0, True) for N in (4, 12, 20, 40, 96)]  # any multiple of four


@pytest.mark.parametrize("T, B, H, N, dtype, decay, with_state", SHAPES)
@pytest.mark.processor
def test_backends_are_as_accurate_as_plain_torch(pair, T, B, H, N, dtype, decay, with_state):
    B, H = (1, 1) if T > 64 and N == 128 else (B, H)  # the reference is slow
    assert_as_accurate(pair, B, T, H, N, dtype=dtype, decay=CASES[pair[0]].decays[decay], with_state=with_state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_state", (True, False))
def test_packed_sequences_are_computed_apart(pair, with_state, dtype):
    case, found = assert_as_accurate(pair, 1, 280, 2, 64, lengths=PACKED, dtype=dtype, with_state=with_state)
    op, backend = pair
    near = LIMITS[op].alone
    for n, (start, end) in enumerate(zip(case.cu_seqlens, case.cu_seqlens[1:])):
        rows = (*CASES[op].recurrence.signature.rows, "gy")
        cut = {name: getattr(case, name)[:, start:end] for name in rows} | {"cu_seqlens": None}
        states = {name: getattr(case, name)[n : n + 1] for name in ("state", "gfinal") if with_state}
        for name, alone in results(op, backend, dataclasses.replace(case, **cut, **states)).items():
            if name != "gu":  # which sums over all sequences
                whole = found[name][n : n + 1] if "state" in name else found[name][:, start:end]
                torch.testing.assert_close(whole, alone, rtol=near, atol=near * (1 if dtype == DTYPES[0] else 100))


@pytest.mark.parametrize("splits", [(1,), (31,), (64,), (90,), tuple(range(1, 100))], ids=len)
def test_a_sequence_in_parts_equals_the_whole(pair, splits):
    """In two, and a token at a time."""
    op, backend = pair
    case, truth, _ = made(op, 2, 100, 2, 64)
    leaves = [x.detach().clone().requires_grad_() for x in (*case.inputs, case.state)]
    *inputs, state = leaves
    ys, ends = [], (*splits, 100)
    for start, end in zip((0, *splits), ends):
        y, state = forward(op, backend, *(x[:, start:end] if x.ndim == 4 else x for x in inputs), state, None)
        ys.append(y)
    y = torch.cat(ys, dim=1)
    torch.autograd.backward([y, state], [case.gy.to(y), case.gfinal.to(state)])
    tolerance = 2e-2 if backend == "cuda" else 1e-5
    for (name, true), found in zip(truth.items(), [y, state, *(x.grad for x in leaves)]):
        assert (true - found.detach().cpu()).norm() <= tolerance * true.norm(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "B, H, N, lengths", [(1, 1, 64, None), (2, 3, 64, None), (1, 1, 40, (1, 69, 60)), (1, 1, 128, None)]
)
@pytest.mark.parametrize("op", CASES)
def test_threads_share_sequences_heads_and_the_values_of_a_head(op, B, H, N, lengths, dtype):
    """Gradients that sum over a head's values may round differently, because several threads have a part of them."""
    if reason := CASES[op].recurrence.cpu.unavailable():
        pytest.skip(reason)
    case, before, found = CASES[op].make((B, 130, H, N), dtype, lengths=lengths), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 9):
            torch.set_num_threads(count)
            found.append(results(op, "cpu", case))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for name, one in found[0].items():
            bound = 10 * torch.finfo(one.dtype).eps * one.norm()
            assert (others[name] - one).norm() <= bound, name


@pytest.mark.parametrize("decay", range(4))
@pytest.mark.parametrize("lengths", (None, (1, 17, 282, 1, 32)))
@pytest.mark.parametrize("op", CASES)
def test_the_chunked_form_is_exact(op, lengths, decay):
    """Nothing is divided, and no decay is capped; in float64, because roundings hide nothing there."""
    case = CASES[op].make((1, 333, 2, 8), torch.float64, decay=CASES[op].decays[decay], lengths=lengths)
    inputs = [x.double() for x in (*case.inputs, case.state)]
    gy, gfinal, form = case.gy, case.gfinal.double(), CASES[op].recurrence.chunked
    y, final, checkpoints = form.forward(*inputs, case.cu_seqlens, save=True)
    found = [y, final, *form.backward(*inputs, case.cu_seqlens, checkpoints, gy, gfinal)]
    true = results(op, "reference", case, torch.float64)
    largest = max(x.norm() for x in true.values())
    for (name, truth), x in zip(true.items(), found, strict=True):
        assert (x - truth).norm() <= LIMITS[op].exact * max(truth.norm(), LIMITS[op].tiny * largest), name


@pytest.mark.parametrize("op", CASES)
def test_the_reference_is_the_formula(op):
    """Token by token in float64, nothing shared with the package."""
    case = CASES[op].make((1, 7, 1, 8), torch.float64)
    r, k, v, w = (getattr(case, name)[0, :, 0] for name in "rkvw")
    S, ys = case.state[0, 0].double(), []
    for t in range(7):
        if op == "wkv6":  # rows of keys
            written = torch.outer(k[t], v[t])
            ys.append(r[t] @ (S + case.u.double().T * written))
            S = (-w[t].exp()).exp()[:, None] * S + written
        else:  # rows of values
            a, b = case.a[0, t, 0], case.b[0, t, 0]
            decay = (-torch.tensor(-0.5, dtype=r.dtype).exp() * w[t].sigmoid()).exp()
            S = S * decay + torch.outer(S @ a, b) + torch.outer(v[t], k[t])
            ys.append(S @ r[t])
    y, final, *_ = CASES[op].truth(case)
    torch.testing.assert_close((y[0, :, 0], final[0, 0]), (torch.stack(ys), S), rtol=1e-12, atol=1e-12)
