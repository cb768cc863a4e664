"""wkv6 with its decay, norm and gate as one Function, through the CUDA kernels on the CPU (tests/cuda_shim): against
float64, every gradient; and where it is taken."""

import pytest
import torch

from cuda_shim import cases, shim
from cuda_shim.cases import check_empty_ends, error, rms
from cuda_shim.running import one_torch_thread, shim_kernels
from rwkv_peft.ops.mix import cpu, norm_gate
from rwkv_peft.ops.mix import cuda as mix_cuda
from rwkv_peft.ops.native.errors import BuildError
from rwkv_peft.ops.recurrence import checks
from rwkv_peft.ops.wkv6 import cuda, gated, reference, wkv6_gated

NAMES = ("out", "final state", "gr", "gk", "gv", "glow", "gu", "gg", "gstate")
EPS = 64e-5


@pytest.fixture(scope="module", autouse=True)
def quiet_torch():
    with one_torch_thread():
        yield


@pytest.fixture
def on_shim(monkeypatch):
    """CPU tensors go through the CUDA kernels; what is to be filled begins as NaN. Gives the names of all kernels as
    they are launched."""
    try:
        mix = shim.build(mix_cuda.FAMILY)
    except BuildError as error:
        pytest.skip(str(error))
    mix.set_order("ascending")
    launched = []

    def call(name, like, tensors, **sizes):
        launched.append(name)
        mix_cuda.launch(mix, None, name, like, tensors, **sizes)

    recurrence = shim_kernels("wkv6")
    run_one = recurrence.run
    recurrence.run = lambda name, *rest: launched.append(name) or run_one(name, *rest)
    empty_like = torch.empty_like
    poisoned = lambda x, **kinds: empty_like(x, **kinds).fill_(float("nan"))  # noqa: E731
    monkeypatch.setattr(torch, "empty_like", poisoned)
    monkeypatch.setattr(cpu, "call", call)
    monkeypatch.setattr(cuda.FAMILY, "kernels", lambda device: recurrence)
    monkeypatch.setattr(gated.WKV6.backends, "choose", lambda *_: "cuda")
    monkeypatch.setattr(gated, "norms_fused", lambda *_: True)
    return launched


def decay_of(case, rank=64):
    """low, up and the parameter of a decay: of ordinary ones, or where the case's are not, of rank N those of its first
    head, for every head."""
    B, T, H, N = case.w.shape
    generator = torch.Generator().manual_seed(8)
    if case.w.min() >= -7 and case.w.max() <= 2:
        low, up = (torch.rand(shape, generator=generator) - 0.5 for shape in ((B, T, rank), (rank, H * N)))
        parameter = torch.rand(1, 1, H * N, generator=generator) * 4 - 5
    else:
        low, up, parameter = case.w[:, :, 0], torch.eye(N).repeat(1, H), torch.zeros(1, 1, H * N)
    return [x.to(case.r.dtype) for x in (low, up, parameter)]


def inputs_of(case, offset=0.0, rank=64):
    """The case's r, k and v, low, u and g, then what may be frozen: up and the decay's parameter, and the norm's weight
    and bias. offset: of the values, and so of y's mean."""
    _, _, H, N = case.r.shape
    generator = torch.Generator().manual_seed(9)
    g = 2 * torch.randn(*case.r.shape[:2], H * N, generator=generator)
    parameters = [torch.randn(H * N, generator=generator) for _ in range(2)]
    low, up, parameter = decay_of(case, rank)
    g, *parameters = (x.to(case.r.dtype) for x in (g, *parameters))
    return [case.r, case.k, case.v + offset, low, case.u, g, up, parameter, *parameters]


def called(function, inputs, state, cu_seqlens):
    """A function of wkv6_gated's arguments, on what inputs_of gives."""
    *rows, low, u, g, up, parameter, weight, bias = inputs
    return function(tuple(rows), (low, up, parameter), u, g, weight, bias, EPS, state, cu_seqlens)


def results(case, dtype, function, trained=(), offset=0.0, rank=64):
    """out, final state and the gradients of r, k, v, low, u, g and state, by NAMES; then those of the last four inputs,
    the parameters, by their numbers in `trained`."""
    inputs = inputs_of(case, offset, rank)
    kinds = [torch.promote_types(dtype, torch.float32) if i == 4 else dtype for i in range(10)]  # u is float32
    leaves = [
        x.detach().to(kind).requires_grad_(i < 6 or i in trained)
        for i, (x, kind) in enumerate(zip(inputs, kinds, strict=True))
    ]
    state = None if case.state is None else case.state.detach().clone().to(kinds[4]).requires_grad_()
    out, final = called(function, leaves, state, case.cu_seqlens)
    gout = case.gy.to(dtype).view(out.shape)
    if case.gfinal is None:
        out.backward(gout)
    else:
        torch.autograd.backward([out, final], [gout, case.gfinal.to(final.dtype)])
    whole = [*leaves[:6], *([] if state is None else [state])]
    found = [torch.zeros_like(x) if x.grad is None else x.grad for x in whole]  # one token's low, to plain torch
    return dict(zip(NAMES, (out.detach(), final.detach(), *found))), [x.grad for x in leaves[6:]]


def plainly(rows, decay, u, g, weight, bias, eps, state, cu_seqlens):
    """The same in plain torch, all of it in the rows' dtype."""
    dtype = rows[0].dtype
    loop = reference.wkv6 if dtype == torch.float64 else cases._loop
    w = gated.made(decay, rows[0])
    y, final = loop(*rows, w, u.to(dtype), state if state is None else state.to(dtype), cu_seqlens)
    B, T, H, N = y.shape
    normal = torch.nn.functional.group_norm(y.reshape(B * T, H * N), H, weight, bias, eps).view(g.shape)
    return normal * torch.nn.functional.silu(g), final


def check(case, **kinds):
    """Every result's error is at most twice plain torch's in the same precision. Where the true gradient of a decay is
    near zero its scale is that of k gk, of which it is a difference."""
    ours, _ = results(case, torch.bfloat16, wkv6_gated, **kinds)
    true, plain = (results(case, dtype, plainly, **kinds)[0] for dtype in (torch.float64, torch.bfloat16))
    assert ours.keys() == true.keys()
    for name, x in ours.items():
        assert x.shape == true[name].shape
        scale = rms(true[name]) + (rms(case.k * true["gk"]) if name == "glow" else 0.0)
        # Plain torch's is 0 times infinity where exp(w) overflows.
        bound = 2 * error(plain[name].nan_to_num(nan=0.0), true[name]) + 32 * torch.finfo(torch.float32).eps * scale
        assert error(x, true[name]) <= bound, f"{name}: error {error(x, true[name]):.2e}, bound {bound:.2e}"


GATED = ["wkv6_forward_gated_64", "wkv6_backward_gated_64"]
ONE = ["wkv6_forward_gated_64_decay_64", "wkv6_backward_gated_64_decay_64"]


@pytest.mark.parametrize(
    "B, T, lengths, with_state",
    [
        (2, 17, None, True),
        (1, 1, None, False),
        (1, 16, None, True),
        (2, 64, None, False),
        (1, 65, None, True),
        (1, 150, None, True),
        (1, 147, [1, 16, 33, 25, 64, 8], True),
    ],
)
def test_every_result_is_as_exact_as_plain_torch(on_shim, B, T, lengths, with_state):
    check(cases.make_case(B, T, 2, 64, torch.bfloat16, lengths=lengths, with_state=with_state, decay="mix", seed=T))
    assert on_shim == ONE


@pytest.mark.parametrize("rank, lengths", [(64, None), (128, None), (128, [16, 1, 50, 13])])
def test_the_decay_is_made_of_the_ranks_that_models_have(on_shim, rank, lengths):
    check(cases.make_case(1, 80, 2, 64, torch.bfloat16, lengths=lengths, seed=rank), rank=rank)
    assert on_shim == [f"{name}_decay_{rank}" for name in GATED]


@pytest.mark.parametrize("kinds", [dict(rank=32), dict(trained=(6,)), dict(trained=(7,))])
def test_another_decay_is_a_product_before(on_shim, kinds):
    """Of another rank, or of trained parameters, whose gradients autograd finds."""
    case = cases.make_case(1, 40, 2, 64, torch.bfloat16)
    found, parameters = results(case, torch.bfloat16, wkv6_gated, **kinds)
    expected, others = results(case, torch.bfloat16, two, **kinds)
    assert on_shim[:2] == GATED
    for name, x in found.items():
        assert error(x, expected[name]) <= 2e-3 * rms(expected[name]), name
    for i, (x, y) in enumerate(zip(parameters, others, strict=True)):
        assert (x is not None) == (6 + i in kinds.get("trained", ()))
        assert x is y is None or error(x, y) <= 1e-2 * rms(y)


def test_a_mean_far_from_zero_costs_no_digits(on_shim):
    check(cases.make_case(1, 40, 2, 64, torch.bfloat16, decay="none", seed=3), offset=4.0)


@pytest.mark.parametrize("T, lengths", [(200, None), (200, [1, 70, 129])])
def test_split_time_makes_ys_gradient_before_its_passes(on_shim, monkeypatch, T, lengths):
    for recurrence in (cuda.RECURRENCE, cuda.WITH_GATE):
        monkeypatch.setattr(recurrence, "group_of", lambda *_: 64)
    check(cases.make_case(1, T, 2, 64, torch.bfloat16, lengths=lengths, decay="mix", seed=T))
    before = ["wkv6_{}_groups_64", "wkv6_{}_scan"]
    forward, backward = ([name.format(way) for name in before] for way in ("forward", "backward"))
    assert on_shim == [*forward, GATED[0], "norm_gate_backward", *backward, "wkv6_backward_64"]


@pytest.mark.parametrize("group", [0, 64])
def test_empty_sequences_at_the_end_change_no_bit_of_the_others(on_shim, monkeypatch, group):
    """As a recorded step has them, whose bounds nobody reads."""
    monkeypatch.setattr(checks, "_has_values", lambda x: False)
    for recurrence in (cuda.RECURRENCE, cuda.WITH_GATE, *cuda.WITH_DECAY.values()):
        monkeypatch.setattr(recurrence, "group_of", lambda *_: group)
    raised = cases.make_case(1, 147, 2, 64, torch.bfloat16, lengths=[1, 130, 16, 0, 0], seed=2)
    check_empty_ends(raised, lambda case: results(case, torch.bfloat16, wkv6_gated)[0])


def test_the_kernels_agree_with_those_of_two_operations(on_shim):
    """They round at the same places, so that little but the sums' order differs."""
    case = cases.make_case(1, 100, 2, 64, torch.bfloat16, seed=5)
    in_one, _ = results(case, torch.bfloat16, wkv6_gated)
    apart, _ = results(case, torch.bfloat16, two)
    assert torch.equal(in_one["final state"], apart["final state"])
    for name, x in in_one.items():
        assert error(x, apart[name]) <= 2e-3 * rms(apart[name]), name


@pytest.mark.parametrize("order", shim.ORDERS)
def test_no_order_of_the_threads_changes_a_bit(on_shim, order):
    case = cases.make_case(1, 115, 1, 64, torch.bfloat16, lengths=[84, 31])
    expected, _ = results(case, torch.bfloat16, wkv6_gated, rank=128)
    cuda.FAMILY.kernels(0).set_order(order)
    found, _ = results(case, torch.bfloat16, wkv6_gated, rank=128)
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def cancelling(T, H, N, rank, chunk):
    """low, up and the parameter of decays of all sizes in a chunk of 16 of the T tokens, by sums that rise and fall so
    far that their order tells; of all other tokens, none."""
    generator = torch.Generator().manual_seed(rank + chunk)
    randn = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    large, up = 16 * randn(T, rank // 2 - 1), 16 * randn(rank // 2 - 1, H * N)
    low = torch.cat((large, randn(T, 1), torch.ones(T, 1), large), dim=1)
    up = torch.cat((up, randn(1, H * N), randn(1, H * N) + 26, -up))
    low[: chunk * 16] = low[chunk * 16 + 16 :] = 0
    return [x.bfloat16() for x in (low[None], up, torch.full((1, 1, H * N), -30.0))]


@pytest.mark.parametrize("chunk", range(6))
@pytest.mark.parametrize("rank", cuda.RANKS)
def test_backward_makes_the_decay_in_forwards_bits(on_shim, rank, chunk):
    """Ones become the decays of the only chunk that has any, forwards as a state, backwards as a state's gradient."""
    T, H, N = 90, 2, 64
    rows = torch.zeros(3, 1, T, H, N, dtype=torch.bfloat16).requires_grad_()
    g, weight, bias = torch.zeros(1, T, H * N), torch.ones(H * N), torch.zeros(H * N)
    state = torch.ones(1, H, N, N, requires_grad=True)
    decay, gate = cancelling(T, H, N, rank, chunk), [x.bfloat16() for x in (g, weight, bias)]
    _, final = wkv6_gated(tuple(rows), decay, torch.zeros(H, N), *gate, EPS, state)
    final.backward(torch.ones_like(final))
    assert on_shim == [f"{name}_decay_{rank}" for name in GATED]
    assert len(final.unique()) > 64 and torch.equal(final, state.grad)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("rank", [64, 32])
def test_one_of_the_results_alone(on_shim, rank, which):
    """Without a gradient, that of zeros is taken; the final state's needs no gate where w is given."""
    case = cases.make_case(1, 5, 1, 64, torch.bfloat16)
    inputs = [x.requires_grad_(i < 6) for i, x in enumerate(inputs_of(case, rank=rank))]
    outs = called(wkv6_gated, inputs, case.state, None)
    outs[which].sum().backward()
    given = [GATED[0], GATED[1] if which == 0 else "wkv6_backward_64"]
    assert on_shim == (ONE if rank == 64 else given)
    assert all(x.grad.isfinite().all() for x in inputs[1 if which else 0 : 3])


def test_what_is_not_differentiated_has_the_same_bits_and_keeps_nothing(on_shim):
    """Where blocks are recomputed, the first pass is such a one."""
    case = cases.make_case(1, 70, 2, 64, torch.bfloat16)
    inputs = inputs_of(case)
    with torch.no_grad():
        quietly = called(wkv6_gated, inputs, case.state, None)
    for x in inputs[:6]:
        x.requires_grad_()
    out, final = called(wkv6_gated, inputs, case.state, None)
    assert on_shim == [ONE[0], ONE[0]] and torch.equal(quietly[0], out) and torch.equal(quietly[1], final)


def test_a_decay_made_inside_is_not_kept(on_shim):
    """Of the rows' size backward has r, k, v, y and g."""
    case = cases.make_case(1, 70, 2, 64, torch.bfloat16)
    inputs = [x.requires_grad_(i < 6) for i, x in enumerate(inputs_of(case))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        called(wkv6_gated, inputs, None, None)
    assert len([x for x in kept if x.numel() == case.w.numel()]) == 5


def test_a_second_derivative_is_refused(on_shim):
    case = cases.make_case(1, 3, 1, 64, torch.bfloat16)
    inputs = [x.requires_grad_(i < 6) for i, x in enumerate(inputs_of(case))]
    out, _ = called(wkv6_gated, inputs, None, None)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.float().sum(), inputs[0], create_graph=True)


def two(rows, decay, u, g, weight, bias, eps, state, cu_seqlens):
    """The decay, the recurrence and its gate, one after the other."""
    y, final = gated.wkv6(*rows, gated.made(decay, rows[0]), u, state, cu_seqlens)
    return norm_gate(y, g, weight, bias, eps), final


@pytest.mark.parametrize(
    "dtype, N, trained",
    [(torch.bfloat16, 64, True), (torch.float32, 64, False), (torch.bfloat16, 32, False), (torch.bfloat16, 128, False)],
)
def test_what_else_takes_two_operations(on_shim, dtype, N, trained):
    """Trained parameters have gradients, and other dtypes and head sizes have kernels of their own."""
    case = cases.make_case(1, 9, 2, N, dtype)
    found, parameters = results(case, dtype, wkv6_gated, (8, 9) if trained else ())
    assert not {*ONE, *GATED} & {*on_shim} and all((x is not None) == trained for x in parameters[2:])
    expected, others = results(case, dtype, two, (8, 9) if trained else ())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(parameters, others, strict=True))
