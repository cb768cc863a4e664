"""The recurrences' CUDA kernels against the float64 reference, and laws of them: sequences, states and gradients
passed on, memory, the order of threads; and the operations that call them. Run on the CPU through tests/cuda_shim, and
on a GPU if there is one."""

import dataclasses
import functools
import re
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from cuda_shim.cases import CASES, error, rms
from cuda_shim.shim import DEVICES, ORDERS, built, record, runner
from rwkv_peft.ops.native.build import source_directory
from rwkv_peft.ops.recurrence import kernels as cuda

pytestmark = pytest.mark.usefixtures("quiet_torch")

LENGTHS = (1, 2, 15, 16, 17, 64, 100, 257)
DECAYS7 = CASES["wkv7"].decays
# recurrence, T, decays: of wkv7 every value of every parameter, in rotation, rather than every combination
ACCURACY = [("wkv6", T, "ordinary", {}) for T in LENGTHS]
ACCURACY += [("wkv7", T, DECAYS7[i % 4], {}) for i, T in enumerate(LENGTHS)]
ACCURACY += [("wkv6", 37, decay, {}) for decay in ("none", "all", "mix")]
# the worst triangular system of a chunk: all tokens have one key, and nothing fades
ACCURACY += [("wkv7", 40, "none", dict(repeated=True))]
# recurrence, B, T or the lengths of packed sequences, a group's tokens, and what else makes a case. Those of wkv7 are
# at both ends of the decays' range, and one in which nothing fades and a group removes one direction.
SPLIT = [
    ("wkv6", 2, 200, 64, dict(decay="mix")),
    ("wkv6", 1, 161, 128, dict(with_state=False)),
    ("wkv6", 1, [1, 70, 64, 3, 200, 129], 64, dict(decay="none")),
    ("wkv6", 1, [300, 2, 17], 128, dict(decay="mix")),
    ("wkv6", 1, [100, 150], 1024, dict(with_state=False)),
    ("wkv7", 2, 129, 64, dict(decay="none")),
    ("wkv7", 1, 129, 64, dict(decay="none", repeated=True)),
    ("wkv7", 1, [1, 130, 64, 65], 64, dict(decay="mixed")),
    ("wkv7", 1, [200], 64, dict(decay="strong")),
    ("wkv7", 1, 129, 64, dict(with_state=False)),
]
GROUPS = [0, 64]  # the tokens of a group where time is split, else 0


@pytest.fixture(scope="module", params=CASES)
def op(request):
    return request.param


@pytest.fixture(scope="module")
def cases(op):
    return CASES[op]


@pytest.fixture(scope="module", params=DEVICES)
def runs(request):
    """A recurrence's name -> a function: case -> the kernels' results, on the CPU or on the GPU."""
    return functools.cache(functools.partial(runner, device=request.param))


@pytest.fixture(scope="module")
def run(runs, op):
    return runs(op)


@pytest.fixture
def on_shim(cases, monkeypatch):
    """The kernels on the CPU, which the recurrence takes for its own."""
    kernels = built(cases.cuda.family)
    monkeypatch.setattr(cases.cuda.family, "kernels", lambda device: kernels)
    return kernels


def check(op, run, shape, **kinds):
    """Every result is within twice plain torch's error in the same precision, plus some roundings of its scale. -> the
    case

    If wkv6's true gw is near zero, its scale is that of k gk, because gw is a difference of such terms.
    """
    cases = CASES[op]
    case = cases.make(shape, torch.bfloat16, **kinds)
    true, plain, ours = (dict(zip(cases.results, compute(case))) for compute in (cases.truth, cases.plain, run))
    assert ours.keys() == true.keys()
    for name, x in ours.items():
        assert x.shape == true[name].shape
        scale = rms(true[name]) + (rms(case.k * true["gk"]) if (op, name) == ("wkv6", "gw") else 0.0)
        bound = 2 * error(plain[name], true[name]) + 32 * torch.finfo(torch.float32).eps * scale
        found = error(x, true[name])
        assert found <= bound, f"{name}: error {found:.2e}, bound {bound:.2e}"
    return case


@pytest.mark.parametrize("op, T, decay, kinds", ACCURACY)
def test_results_and_gradients_match_the_reference(runs, op, T, decay, kinds):
    B, H = (1, 1) if T > 64 else (1 + T % 3, 1 + (T + 8) % 3)
    state = T % 2 == 1 or T in (40, 64)
    check(op, runs(op), (B, T, H, 64), decay=decay, with_state=state, seed=T + 64, **kinds)


def test_packed_sequences_are_independent(op, run):
    lengths = [1, 17, 64, 65, 3]
    check(op, run, (1, sum(lengths), 1, 64), lengths=lengths, seed=64)


@pytest.mark.parametrize("op, B, lengths, group, kinds", SPLIT)
def test_split_time_is_as_exact_as_the_whole(runs, op, B, lengths, group, kinds):
    packed = isinstance(lengths, list)
    shape, kinds = (B, sum(lengths) if packed else lengths, 1, 64), kinds | dict(lengths=lengths if packed else None)
    check(op, functools.partial(runs(op), group=group), shape, seed=group, **kinds)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("lengths", [(12, 0, 131), (12, 131, 0, 0)])
def test_an_empty_sequence_hands_its_state_on(run, cases, lengths, group):
    case = cases.make((1, 143, 2, 64), torch.bfloat16, lengths=lengths)
    y, final, *gradients, gstate = run(case, group=group)
    empty = torch.tensor(lengths) == 0
    assert torch.equal(final[empty], case.state[empty]) and torch.equal(gstate[empty], case.gfinal[empty])
    without = dataclasses.replace(
        case, state=case.state[~empty], gfinal=case.gfinal[~empty], cu_seqlens=torch.tensor([0, 12, 143])
    )
    found = (y, final[~empty], *gradients, gstate[~empty])
    for x, expected in zip(found, run(without, group=group), strict=True):
        assert torch.equal(x, expected)


def test_no_tokens_hand_the_state_on(run, cases):
    case = cases.make((2, 0, 2, 64), torch.bfloat16)
    y, final, *gradients, gstate = run(case)
    assert y.shape == (2, 0, 2, 64) and not any(x.any() for x in gradients)
    assert torch.equal(final, case.state) and torch.equal(gstate, case.gfinal)


@pytest.mark.parametrize("at", [16, 33])
def test_two_halves_with_the_state_carried_over_equal_the_whole(run, cases, at):
    whole = cases.make((2, 70, 2, 64), torch.bfloat16, seed=at)

    def part(span, state, gfinal):
        cut = {name: getattr(whole, name)[:, span].contiguous() for name in (*cases.cuda.signature.rows, "gy")}
        return dataclasses.replace(whole, **cut, state=state, gfinal=gfinal)

    middle = run(part(slice(0, at), whole.state, whole.gfinal))[1]
    second = run(part(slice(at, None), middle, whole.gfinal))
    first = run(part(slice(0, at), whole.state, second[-1]))
    join = {"final state": lambda a, b: b, "gstate": lambda a, b: a, "gu": torch.add}
    for name, a, b, expected in zip(cases.results, first, second, run(whole), strict=True):
        joined = join.get(name, lambda a, b: torch.cat([a, b], dim=1))(a, b)
        assert error(joined, expected.double()) <= 0.01 * rms(expected), name


@pytest.mark.parametrize("group", GROUPS)
def test_nothing_is_read_before_it_is_written(run, cases, group):
    """Results, checkpoints and tensors between kernels begin as NaN in torch's deterministic mode, shared memory in the
    shim. One sequence has no tokens, and some places have no group."""
    case = cases.make((1, 135, 2, 64), torch.bfloat16, lengths=[1, 0, 130, 4])
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        results = run(case, group=group)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(results[1][1], case.state[1]) and torch.equal(results[-1][1], case.gfinal[1])
    for x, expected in zip(results, run(case, group=group), strict=True):
        assert torch.equal(x, expected) and x.isfinite().all()


def test_what_is_not_wanted_is_not_computed(on_shim, cases):
    """Without gradients nothing is kept for backward; no gradient of y counts as zeros."""
    case = cases.make((1, 70, 1, 64), torch.bfloat16)
    given = (*case.inputs, case.state, case.cu_seqlens)
    y, final, checkpoints = cases.cuda.forward(*given, save=False, group=0)
    assert checkpoints.shape[0] == 0 and all(map(torch.equal, (y, final), cases.run(on_shim, case)))
    checkpoints = cases.cuda.forward(*given, save=True, group=0)[2]
    found = cases.cuda.backward(*given, checkpoints, None, case.gfinal, group=0)
    expected = cases.run(on_shim, dataclasses.replace(case, gy=torch.zeros_like(case.gy)))[2:]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("group", [96, -64])
def test_a_group_that_the_kernels_do_not_take_is_refused(cases, group):
    case = cases.make((1, 3, 1, 64), torch.bfloat16)
    rule = "a multiple of 64 tokens: give such, or 0"
    for way, more in ((cases.cuda.forward, ()), (cases.cuda.backward, (None, case.gy, None))):
        saving = {} if more else dict(save=True)
        with pytest.raises(ValueError, match=f"group {group}; .*{rule}"):
            way(*case.inputs, None, None, *more, group=group, **saving)


def test_tensors_off_the_16_byte_grid(run, cases):
    case = cases.make((1, 20, 1, 64), torch.bfloat16)
    shifted = case.mapped(lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape))
    assert shifted.k.data_ptr() % 16 and shifted.gfinal.data_ptr() % 16
    for x, expected in zip(run(shifted), run(case), strict=True):
        assert torch.equal(x, expected)


def test_a_nan_is_not_hidden(run, cases):
    case = cases.make((1, 40, 1, 64), torch.bfloat16)
    for name in cases.cuda.signature.rows:
        poisoned = getattr(case, name).clone()
        poisoned[0, 20, 0, 7] = float("nan")
        y, final, *_ = run(dataclasses.replace(case, **{name: poisoned}))
        assert not y[0, :16].isnan().any() and y[0, 20:].isnan().any(), name
        assert name == "r" or (y[0, 32:].isnan().any() and final.isnan().any()), name


@pytest.mark.parametrize("group", GROUPS)
def test_the_order_of_the_threads_does_not_matter(on_shim, cases, group):
    case = cases.make((1, 100, 1, 64), torch.bfloat16)
    expected = cases.run(on_shim, case, group=group)
    for order in ORDERS[1:]:
        on_shim.set_order(order)
        for x, y in zip(cases.run(on_shim, case, group=group), expected, strict=True):
            assert torch.equal(x, y), order


def test_the_driver_is_asked_for_a_block_a_head_and_sequence(cases, monkeypatch):
    recorder = record(cases.cuda.family, monkeypatch)
    cases.run(cases.cuda.family.kernels(0), cases.make((2, 5, 3, 64), torch.bfloat16))
    assert len(recorder.launches) == 2  # forward and backward
    for sizes, _, arguments, extra in recorder.launches:
        assert sizes == [3 * 2, 1, 1, recorder.constant, 1, 1, recorder.constant] and extra is None
        assert (arguments.sequences, arguments.length, arguments.heads) == (2, 5, 3)


def test_groups_are_launched_in_their_order(monkeypatch):
    recorder = record(CASES["wkv7"].cuda.family, monkeypatch)
    case = CASES["wkv7"].make((2, 130, 3, 64), torch.bfloat16)
    CASES["wkv7"].run(CASES["wkv7"].cuda.family.kernels(0), case, group=64)
    groups_of, scan = 2 * 3 * 3, 2 * 3 * 4  # three groups a sequence; four blocks a head
    assert [sizes[0] for sizes, *_ in recorder.launches] == 2 * [groups_of, scan, groups_of]  # forward, backward
    assert all((a.group, a.groups, a.sequences, a.length) == (64, 6, 2, 130) for _, _, a, _ in recorder.launches)


def test_the_names_are_those_of_the_source(cases):
    source = (source_directory("cuda") / cases.cuda.family.source).read_text(encoding="utf-8")
    assert {*re.findall(r"^RECURRENCE_KERNEL\((\w+),", source, re.MULTILINE)} == {*cases.cuda.names}


@pytest.mark.filterwarnings("ignore:.*takes backend 'chunked', which is slow")
@pytest.mark.parametrize("dtype, N", [(torch.float32, 64), (torch.bfloat16, 32)])
def test_what_they_do_not_take_is_computed_by_torch(cases, monkeypatch, dtype, N):
    """On a GPU, and in a plan for one; a kernel asked for by name is refused, with what it takes."""
    recurrence, rule = cases.recurrence, "its kernels take bfloat16 and heads of 64, and these are "
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(cases.cuda.family, "unavailable", lambda: None)
    recurrence._resolve.cache_clear()
    try:
        assert recurrence.choose("auto", "meta", None, torch.bfloat16, 64) == "cuda"
        assert recurrence.choose("auto", "cuda", 0, torch.bfloat16, 64) == "cuda"
        assert recurrence.choose("auto", "meta", None, dtype, N) == "chunked"
        with pytest.warns(RuntimeWarning, match=f"{rule}{str(dtype)[6:]} and {N}"):
            assert recurrence.choose("auto", "cuda", 0, dtype, N) == "chunked"
        with pytest.raises(ValueError, match=f"'cuda' cannot be used: {rule}{str(dtype)[6:]} and {N}"):
            recurrence.choose("cuda", "cuda", 0, dtype, N)
    finally:
        recurrence._resolve.cache_clear()


@pytest.mark.parametrize(
    "B, T, H, sequences, group",
    [
        (1, 4096, 64, 1, 1024),  # 256 blocks
        (1, 1024, 32, 1, 128),
        (1, 4000, 64, 1, 1024),
        (2, 4096, 32, 2, 1024),
        (1, 8192, 32, 2, 1408),  # packed; each may leave a place unused
        (8, 4096, 32, 8, 0),  # the blocks are enough as they are
        (1, 4096, 128, 1, 0),  # 2 groups would not pay
        (1, 256, 12, 1, 0),  # nor would 3 as short as these
    ],
)
def test_time_is_split_where_that_pays(B, T, H, sequences, group, monkeypatch):
    """On a GPU alone."""
    resident = 264  # two blocks on each of an H100's multiprocessors
    assert cuda.choose_group(B, T, H, sequences, resident) == group
    assert H * cuda.places(B, T, sequences, group) <= resident
    monkeypatch.setattr(cuda, "resident_blocks", lambda *_: resident)
    r = SimpleNamespace(is_cuda=True, shape=(B, T, H, 64), device=torch.device("cuda", 0))
    assert CASES["wkv7"].cuda.group_of(r, sequences) == group
    planned = torch.empty(B, T, H, 64, dtype=torch.bfloat16, device="meta")
    assert CASES["wkv7"].cuda.group_of(planned, sequences) == 0


@pytest.mark.parametrize("capability, on_small, blocks", [((9, 0), 1, 264), ((8, 9), 2, 264), ((8, 9), 1, 132)])
def test_a_gpu_holds_two_blocks_a_multiprocessor_where_they_fit(monkeypatch, capability, on_small, blocks):
    properties = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert cuda.resident_blocks.__wrapped__(0, on_small) == blocks


@pytest.mark.parametrize("lengths, group", [([80], 0), ([80], 64), ([20, 130], 64)])
def test_the_operation_calls_them_and_splits_time(op, cases, on_shim, monkeypatch, lengths, group):
    """The operation itself, and torch's operators and derivatives below it, as on a GPU."""
    recurrence = cases.recurrence
    monkeypatch.setattr(recurrence, "choose", lambda *_: "cuda")
    monkeypatch.setattr(cases.cuda, "group_of", lambda *_: group)
    launched, run_one = [], on_shim.run
    monkeypatch.setattr(on_shim, "run", lambda name, *rest: launched.append(name) or run_one(name, *rest))

    def compute(case):
        leaves = [x.detach().clone().requires_grad_() for x in (*case.inputs, case.state)]
        y, final = recurrence.compute(leaves[:-1], leaves[-1], case.cu_seqlens, "auto")
        torch.autograd.backward([y, final], [case.gy, case.gfinal])
        return y.detach(), final.detach(), *(x.grad for x in leaves)

    bounds = lengths if len(lengths) > 1 else None
    case = check(op, compute, (1, sum(lengths), 2, 64), lengths=bounds)
    splits = {*cases.cuda.split.names()}
    assert splits & {*launched} == (splits if group else set())
    given = (*case.inputs, case.state, case.cu_seqlens)
    kept = cases.cuda.forward(*given, save=True)[2]
    assert kept.shape[0] == cases.cuda.checkpoint_count(case.gy, case.state.shape[0])


@pytest.mark.parametrize(
    "version, capability, words",
    [(None, None, "CUDA build of torch"), ("13.0", None, "no NVIDIA GPU"), ("13.0", (7, 5), "a T4 has .* 7.5")],
)
def test_the_reason_why_they_are_unavailable(cases, monkeypatch, version, capability, words):
    monkeypatch.setattr(torch.version, "cuda", version)
    for name, value in dict(is_available=capability is not None, current_device=0, get_device_name="a T4").items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert re.search(words, cases.cuda.unavailable())


@pytest.mark.filterwarnings("ignore:.*takes backend 'chunked', which is slow")
def test_each_gpu_has_a_verdict_of_its_own(cases, monkeypatch):
    recurrence, current = cases.recurrence, []

    @contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(cases.cuda.family, "unavailable", lambda: None if current[-1] == 0 else "this GPU is too old")
    recurrence._resolve.cache_clear()
    try:
        assert recurrence.choose("auto", "cuda", 0, torch.bfloat16, 64) == "cuda"
        assert recurrence.choose("auto", "cuda", 1, torch.bfloat16, 64) == "chunked"
        with pytest.raises(RuntimeError, match="this GPU is too old"):
            recurrence.choose("cuda", "cuda", 1, torch.bfloat16, 64)
    finally:
        recurrence._resolve.cache_clear()
