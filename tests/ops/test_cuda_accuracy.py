"""The recurrences' CUDA kernels against the float64 reference, and the operations that call them: run on the CPU
through tests/cuda_shim, and on a GPU if there is one."""

import functools
from types import SimpleNamespace

import pytest
import torch

from cuda_shim import toolchain, wkv7_cases
from cuda_shim.cases import error, rms
from cuda_shim.running import DEVICES, FAMILIES, runner, shim_kernels
from rwkv_peft.ops import wkv6, wkv7
from rwkv_peft.ops.recurrence import cuda
from rwkv_peft.ops.wkv6.op import WKV6
from rwkv_peft.ops.wkv7.op import WKV7

pytestmark = pytest.mark.usefixtures("quiet_torch")

OPERATIONS = {"wkv6": (wkv6.wkv6, WKV6), "wkv7": (wkv7.wkv7, WKV7)}
LENGTHS = (1, 2, 15, 16, 17, 64, 100, 257)
SIZES = {"wkv6": (8, 64, 128), "wkv7": (128, 8, 20, 64)}
DECAYS7 = tuple(wkv7_cases.DECAYS)
DTYPES = (torch.bfloat16, torch.float32)
# family, T, N, decays: of wkv7 every value of every parameter, in rotation, rather than every combination
CASES = [("wkv6", T, N, "ordinary") for T in LENGTHS for N in SIZES["wkv6"]]
CASES += [("wkv7", T, SIZES["wkv7"][i % 4], DECAYS7[(i // 2) % 4]) for i, T in enumerate(LENGTHS)]
CASES += [("wkv7", T, 64, DECAYS7[i % 4]) for i, T in enumerate(LENGTHS) if T not in (16, 257)]
# family, B, T or the lengths of packed sequences, a group's tokens, and what else makes a case. Those of wkv7 are at
# both ends of the decays' range, and one in which nothing fades and a group removes one direction.
SPLIT_CASES = [
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


@pytest.fixture(scope="module", params=DEVICES)
def run(request):
    """family -> a function: case -> the kernels' results, on the CPU or on the GPU."""
    return functools.cache(functools.partial(runner, device=request.param))


def check(family, run, shape, dtype, **kinds):
    """Every result is within twice plain torch's error in the same precision, plus some roundings of its scale. -> the
    case

    If wkv6's true gw is near zero, its scale is that of k gk, because gw is a difference of such terms.
    """
    cases = FAMILIES[family][1]
    case = cases.make_case(shape, dtype, **kinds)
    true, plain, ours = (dict(zip(cases.RESULTS, compute(case))) for compute in (cases.truth, cases.plain, run))
    assert ours.keys() == true.keys()
    for name, x in ours.items():
        assert x.shape == true[name].shape
        scale = rms(true[name]) + (rms(case.k * true["gk"]) if (family, name) == ("wkv6", "gw") else 0.0)
        bound = 2 * error(plain[name], true[name]) + 32 * torch.finfo(torch.float32).eps * scale
        found = error(x, true[name])
        assert found <= bound, f"{name}: error {found:.2e}, bound {bound:.2e}"
    return case


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("family, T, N, decay", CASES)
def test_results_and_gradients_match_the_reference(run, family, T, N, decay, dtype):
    B, H = (1, 1) if T > 64 else (1 + T % 3, 1 + (T + N // 8) % 3)
    state = T % 2 == 1 or T == 64
    check(family, run(family), (B, T, H, N), dtype, decay=decay, with_state=state, seed=T + N)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("N", SIZES["wkv6"])
@pytest.mark.parametrize("decay", ["none", "all", "mix"])
def test_extreme_decays(run, decay, N, dtype):
    check("wkv6", run("wkv6"), (2, 37, 2, N), dtype, decay=decay, seed=N)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("N", [4, 36, 64])
def test_tokens_that_take_away_what_the_one_before_wrote(run, N, dtype):
    """The worst triangular system of a chunk: all tokens have one key, and nothing fades."""
    check("wkv7", run("wkv7"), (1, 40, 2, N), dtype, decay="none", repeated=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("family, N", [*(("wkv6", N) for N in SIZES["wkv6"]), ("wkv7", 12), ("wkv7", 64)])
def test_packed_sequences_are_independent(run, family, N, dtype):
    lengths = [1, 17, 64, 65, 3]
    check(family, run(family), (1, sum(lengths), 1, N), dtype, lengths=lengths, seed=N)


@pytest.mark.parametrize("family, B, lengths, group, kinds", SPLIT_CASES)
def test_split_time_is_as_exact_as_the_whole(run, family, B, lengths, group, kinds):
    packed = isinstance(lengths, list)
    shape, kinds = (B, sum(lengths) if packed else lengths, 1, 64), kinds | dict(lengths=lengths if packed else None)
    check(family, functools.partial(run(family), group=group), shape, torch.bfloat16, seed=group, **kinds)


def test_groups_are_launched_in_their_order(monkeypatch):
    recorder = toolchain.record(wkv7.cuda.FAMILY, monkeypatch)
    wkv7_cases.run(wkv7.cuda.FAMILY.kernels(0), wkv7_cases.make_case((2, 130, 3, 64), torch.bfloat16), group=64)
    groups_of, scan = 2 * 3 * 3, 2 * 3 * 4  # three groups a sequence; four blocks a head
    assert [sizes[0] for sizes, *_ in recorder.launches] == 2 * [groups_of, scan, groups_of]  # forward, backward
    assert all((a.group, a.groups, a.sequences, a.length) == (64, 6, 2, 130) for _, _, a, _ in recorder.launches)


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
def test_time_is_split_where_that_pays(B, T, H, sequences, group):
    resident = 264  # two blocks on each of an H100's multiprocessors
    assert cuda.choose_group(B, T, H, sequences, resident) == group
    assert H * cuda.places(B, T, sequences, group) <= resident


def test_only_the_chunked_kernels_on_a_gpu_split_time(monkeypatch):
    monkeypatch.setattr(cuda, "resident_blocks", lambda *_: 264)
    for N, dtype, on_gpu, expected in (
        (64, torch.bfloat16, True, 1024),
        (64, torch.float32, True, 0),
        (32, torch.bfloat16, True, 0),
        (64, torch.bfloat16, False, 0),  # where memory is planned without a GPU
    ):
        r = SimpleNamespace(is_cuda=on_gpu, dtype=dtype, shape=(1, 4096, 64, N), device=torch.device("cuda", 0))
        assert wkv7.cuda.RECURRENCE.group_of(r, 1) == expected


@pytest.mark.parametrize(
    "family, lengths, dtype, N, group, split",
    [
        ("wkv6", [260], torch.bfloat16, 64, 64, True),
        ("wkv6", [260], torch.float32, 64, 0, False),
        ("wkv7", [80], torch.float32, 8, 0, False),
        ("wkv7", [20, 30], torch.float32, 8, 0, False),
        ("wkv7", [80], torch.bfloat16, 64, 64, True),
        ("wkv7", [20, 130], torch.bfloat16, 64, 64, True),
    ],
)
def test_the_operation_calls_them_and_splits_time(monkeypatch, family, lengths, dtype, N, group, split):
    """The operation itself, and torch's operators and derivatives below it, as on a GPU."""
    (operation, backends), cuda, kernels = OPERATIONS[family], FAMILIES[family][0], shim_kernels(family)
    monkeypatch.setattr(backends.backends, "choose", lambda *_: "cuda")
    monkeypatch.setattr(cuda.FAMILY, "kernels", lambda device: kernels)
    monkeypatch.setattr(cuda.RECURRENCE, "group_of", lambda *_: group)
    launched, run_one = [], kernels.run
    monkeypatch.setattr(kernels, "run", lambda name, *rest: launched.append(name) or run_one(name, *rest))

    def compute(case):
        leaves = [x.detach().clone().requires_grad_() for x in (*case.inputs, case.state)]
        y, final = operation(*leaves, cu_seqlens=case.cu_seqlens)
        torch.autograd.backward([y, final], [case.gy, case.gfinal])
        return y.detach(), final.detach(), *(x.grad for x in leaves)

    bounds = lengths if len(lengths) > 1 else None
    case = check(family, compute, (1, sum(lengths), 2, N), dtype, lengths=bounds)
    splits = {*cuda.SPLIT.names()}
    assert splits & {*launched} == (splits if split else set())
    assert operation(*case.inputs, case.state, case.cu_seqlens)[0].grad_fn is None
    kept = cuda.RECURRENCE.forward(*case.inputs, case.state, case.cu_seqlens, save=True)[2]
    assert kept.shape[0] == cuda.RECURRENCE.checkpoint_count(case.r, case.state.shape[0])


@pytest.mark.parametrize("capability, on_small, blocks", [((9, 0), 1, 264), ((8, 9), 2, 264), ((8, 9), 1, 132)])
def test_a_gpu_holds_two_blocks_a_multiprocessor_where_they_fit(monkeypatch, capability, on_small, blocks):
    properties = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert cuda.resident_blocks.__wrapped__(0, on_small) == blocks


@pytest.mark.parametrize("reason, chosen", [(None, "cuda"), ("no driver; install one", "chunked")])
@pytest.mark.filterwarnings("ignore:wkv7 takes backend 'chunked', which is slow.*no driver")
def test_what_auto_takes_on_a_gpu(monkeypatch, reason, chosen):
    monkeypatch.setattr(wkv7.cuda.FAMILY, "unavailable", lambda: reason)
    assert WKV7.backends._resolve_auto("cuda", torch.bfloat16) == chosen
