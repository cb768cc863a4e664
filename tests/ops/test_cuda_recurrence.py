"""Laws of every recurrence's CUDA kernels: sequences, states and gradients passed on, memory and the order of threads.
Run on the CPU through tests/cuda_shim, and on a GPU if there is one; each family's own test compares its results with
float64."""

import dataclasses
import math
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from cuda_shim import shim, toolchain
from cuda_shim.cases import error, rms
from cuda_shim.running import DEVICES, FAMILIES, runner, shim_kernels
from rwkv_peft.ops.native.arguments import aligned
from rwkv_peft.ops.native.build import source_directory
from rwkv_peft.ops.recurrence.cuda import CHUNKED_SIZE
from rwkv_peft.ops.wkv6.op import WKV6
from rwkv_peft.ops.wkv7.op import WKV7

pytestmark = pytest.mark.usefixtures("quiet_torch")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def cuda(family):
    """A family's cuda.py."""
    return FAMILIES[family][0]


@pytest.fixture(scope="module")
def cases(family):
    return FAMILIES[family][1]


@pytest.fixture(scope="module", params=DEVICES)
def run(request, family):
    """case -> the kernels' results."""
    return runner(family, request.param)


# A head size, and the tokens of a group where time is split, else 0.
WAYS = [(20, 0), (64, 0), (64, 64)]


def chunked(cuda):
    """The names of a family's chunked kernels."""
    return [name for name in cuda.RECURRENCE.names if name not in cuda.RECURRENCE.plain]


@pytest.mark.parametrize("N, group", WAYS)
@pytest.mark.parametrize("lengths", [(12, 0, 131), (12, 131, 0, 0)])
def test_an_empty_sequence_hands_its_state_on(run, cuda, cases, lengths, N, group):
    case = cases.make_case((1, 143, 2, N), torch.bfloat16, lengths=lengths)
    y, final, *gradients, gstate = run(case, group=group)
    empty = torch.tensor(lengths) == 0
    assert torch.equal(final[empty], case.state[empty]) and torch.equal(gstate[empty], case.gfinal[empty])
    without = dataclasses.replace(
        case, state=case.state[~empty], gfinal=case.gfinal[~empty], cu_seqlens=torch.tensor([0, 12, 143])
    )
    found = (y, final[~empty], *gradients, gstate[~empty])
    for x, expected in zip(found, run(without, group=group), strict=True):
        assert torch.equal(x, expected)


@pytest.mark.parametrize("N", [8, 64])
def test_no_tokens_hand_the_state_on(run, cases, N):
    case = cases.make_case((2, 0, 2, N), torch.bfloat16)
    y, final, *gradients, gstate = run(case)
    assert y.shape == (2, 0, 2, N) and not any(x.any() for x in gradients)
    assert torch.equal(final, case.state) and torch.equal(gstate, case.gfinal)


@pytest.mark.parametrize("N", [12, 64])
@pytest.mark.parametrize("at", [16, 33])
def test_two_halves_with_the_state_carried_over_equal_the_whole(run, cuda, cases, at, N):
    whole = cases.make_case((2, 70, 2, N), torch.bfloat16, seed=at)

    def part(span, state, gfinal):
        cut = {name: getattr(whole, name)[:, span].contiguous() for name in (*cuda.RECURRENCE.signature.rows, "gy")}
        return dataclasses.replace(whole, **cut, state=state, gfinal=gfinal)

    middle = run(part(slice(0, at), whole.state, whole.gfinal))[1]
    second = run(part(slice(at, None), middle, whole.gfinal))
    first = run(part(slice(0, at), whole.state, second[-1]))
    join = {"final state": lambda a, b: b, "gstate": lambda a, b: a, "gu": torch.add}
    for name, a, b, expected in zip(cases.RESULTS, first, second, run(whole), strict=True):
        joined = join.get(name, lambda a, b: torch.cat([a, b], dim=1))(a, b)
        assert error(joined, expected.double()) <= 0.01 * rms(expected), name


@pytest.mark.parametrize("N, group", WAYS)
def test_nothing_is_read_before_it_is_written(run, cuda, cases, N, group):
    """Results, checkpoints and tensors between kernels begin as NaN in torch's deterministic mode, shared memory in the
    shim. One sequence has no tokens, and some places have no group."""
    if group and N != CHUNKED_SIZE:
        pytest.skip("time is not split at this head size")
    case = cases.make_case((1, 135, 2, N), torch.bfloat16, lengths=[1, 0, 130, 4])
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        results = run(case, group=group)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(results[1][1], case.state[1]) and torch.equal(results[-1][1], case.gfinal[1])
    for x, expected in zip(results, run(case, group=group), strict=True):
        assert torch.equal(x, expected) and x.isfinite().all()


@pytest.mark.parametrize("N", [8, 64])
def test_without_gradients_wanted_nothing_is_kept(family, cuda, cases, N):
    case = cases.make_case((1, 70, 1, N), torch.bfloat16)
    kernels = shim_kernels(family)
    given = (*case.inputs, case.state, case.cu_seqlens)
    with patch.object(cuda.FAMILY, "kernels", lambda device: kernels):
        y, final, checkpoints = cuda.RECURRENCE.forward(*given, save=False, group=0)
    assert checkpoints.shape[0] == 0
    for x, expected in zip((y, final), cases.run(kernels, case)):
        assert torch.equal(x, expected)


@pytest.mark.parametrize("N", [8, 64])
def test_no_gradient_of_y_is_zeros(family, cuda, cases, N):
    case = cases.make_case((1, 40, 1, N), torch.bfloat16)
    kernels = shim_kernels(family)
    given = (*case.inputs, case.state, None)
    with patch.object(cuda.FAMILY, "kernels", lambda device: kernels):
        checkpoints = cuda.RECURRENCE.forward(*given, save=True, group=0)[2]
        found = cuda.RECURRENCE.backward(*given, checkpoints, None, case.gfinal, group=0)
    expected = cases.run(kernels, dataclasses.replace(case, gy=torch.zeros_like(case.gy)))[2:]
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "N, dtype, group", [(64, torch.float32, 64), (20, torch.bfloat16, 64), (64, torch.bfloat16, 96)]
)
def test_a_group_that_the_kernels_do_not_take_is_refused(cuda, cases, N, dtype, group):
    case = cases.make_case((1, 3, 1, N), dtype)
    rule = "a multiple of 64 tokens, for torch.bfloat16 and head size .*64.*: give such, or 0"
    for way, more in ((cuda.RECURRENCE.forward, ()), (cuda.RECURRENCE.backward, (None, case.gy, None))):
        saving = {} if more else dict(save=True)
        with pytest.raises(ValueError, match=f"group {group} for {dtype} and head size {N}; .*{rule}"):
            way(*case.inputs, None, None, *more, group=group, **saving)


def test_inputs_off_the_16_byte_grid(run, cases):
    case = cases.make_case((1, 20, 1, 64), torch.bfloat16)
    storage = torch.zeros(case.k.numel() + 1, dtype=torch.bfloat16)
    storage[1:] = case.k.flatten()
    shifted = dataclasses.replace(case, k=storage[1:].view(case.k.shape))
    assert shifted.k.data_ptr() % 16 != 0
    for x, expected in zip(run(shifted), run(case), strict=True):
        assert torch.equal(x, expected)


def test_what_a_kernel_is_given_lies_on_its_grid(cuda, cases):
    shifted = torch.zeros(65)[1:]
    assert shifted.data_ptr() % 16 and aligned(shifted).data_ptr() % 16 == 0
    inputs = {}

    class Recorded:
        @staticmethod
        def run(name, arguments, *_):
            inputs.update({name: getattr(arguments, name) for name in ("state", "gy", "gfinal", "r")})
            return 0

    case = cases.make_case((1, 20, 1, 8), torch.float32)
    gfinal = torch.cat([torch.zeros(1), case.gfinal.flatten()])[1:].view(case.gfinal.shape)
    with patch.object(cuda.FAMILY, "kernels", lambda device: Recorded):
        cuda.RECURRENCE.backward(*case.inputs, None, None, torch.zeros(2, 1, 8, 8), None, gfinal)
    assert gfinal.data_ptr() % 16 and inputs["gfinal"] % 16 == 0 and inputs["gy"] % 16 == 0


@pytest.mark.parametrize("N", [8, 64])
def test_a_nan_is_not_hidden(run, cuda, cases, N):
    case = cases.make_case((1, 40, 1, N), torch.bfloat16)
    for name in cuda.RECURRENCE.signature.rows:
        poisoned = getattr(case, name).clone()
        poisoned[0, 20, 0, 7] = float("nan")
        y, final, *_ = run(dataclasses.replace(case, **{name: poisoned}))
        assert not y[0, :16].isnan().any() and y[0, 20:].isnan().any(), name
        assert name == "r" or (y[0, 32:].isnan().any() and final.isnan().any()), name


@pytest.mark.parametrize("N, group", WAYS)
def test_the_order_of_the_threads_does_not_matter(family, cuda, cases, N, group):
    if group and N != CHUNKED_SIZE:
        pytest.skip("time is not split at this head size")
    kernels = shim_kernels(family)
    case = cases.make_case((1, 100, 1, N), torch.bfloat16)
    expected = cases.run(kernels, case, group=group)
    for order in shim.ORDERS[1:]:
        kernels.set_order(order)
        for x, y in zip(cases.run(kernels, case, group=group), expected, strict=True):
            assert torch.equal(x, y), order


def test_the_driver_is_asked_for_a_block_a_head_and_sequence(cuda, cases, monkeypatch):
    recorder = toolchain.record(cuda.FAMILY, monkeypatch)
    for N in (64, 20):
        cases.run(cuda.FAMILY.kernels(0), cases.make_case((2, 5, 3, N), torch.bfloat16))
    planned = [
        cuda.RECURRENCE.kernel(direction, N, torch.bfloat16)[1] or (recorder.constant, 1)
        for N in (64, 20)
        for direction in ("forward", "backward")
    ]
    for recorded, block in zip(recorder.launches, planned, strict=True):
        sizes, _, arguments, extra = recorded
        assert sizes == [3 * 2, 1, 1, *block, 1, 1234] and extra is None
        assert (arguments.sequences, arguments.length, arguments.heads) == (2, 5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_names_kernels_that_there_are(family, cuda, dtype):
    """And no more threads per block than the kernels are compiled for."""
    source = (source_directory("cuda") / cuda.FAMILY.source).read_text(encoding="utf-8")
    bounds = dict(toolchain.kernels_of(source))
    assert bounds.keys() == {*chunked(cuda), *cuda.RECURRENCE.plain}
    for direction in ("forward", "backward"):
        for head_size in range(4, 132, 4):
            name, block = cuda.RECURRENCE.kernel(direction, head_size, dtype)
            assert direction in name and (name in cuda.RECURRENCE.plain or dtype == torch.bfloat16)
            assert block is None if name in chunked(cuda) else math.prod(block) <= bounds[name]


@pytest.mark.parametrize(
    "cuda_version, available, words", [(None, False, "CUDA build of torch"), ("13.0", False, "no NVIDIA GPU")]
)
def test_the_reason_why_it_is_unavailable(cuda, monkeypatch, cuda_version, available, words):
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert words in cuda.FAMILY.unavailable()


def test_an_old_gpu_is_named(cuda, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in dict(is_available=True, current_device=0, get_device_name="Tesla T4").items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "Tesla T4 has compute capability 7.5" in cuda.FAMILY.unavailable()


def test_each_gpu_has_a_verdict_of_its_own(family, cuda, monkeypatch):
    backends = {"wkv6": WKV6, "wkv7": WKV7}[family].backends
    current = []

    @contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(cuda.FAMILY, "unavailable", lambda: None if current[-1] == 0 else "this GPU is too old")
    backends._resolve.cache_clear()
    try:
        assert backends.choose("auto", "cuda", 0, torch.bfloat16) == "cuda"
        with pytest.warns(RuntimeWarning, match="this GPU is too old"):
            assert backends.choose("auto", "cuda", 1, torch.bfloat16) != "cuda"
        with pytest.raises(RuntimeError, match="this GPU is too old"):
            backends.choose("cuda", "cuda", 1, torch.bfloat16)
    finally:
        backends._resolve.cache_clear()
