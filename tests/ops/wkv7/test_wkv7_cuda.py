"""The CUDA kernels' source against the float64 reference: run on the CPU through tests/cuda_shim, and on a GPU if
there is one."""

from types import SimpleNamespace

import pytest
import torch

from cuda_shim import toolchain
from cuda_shim import wkv7_cases as cases
from cuda_shim.cases import error, rms
from cuda_shim.running import DEVICES, one_torch_thread, runner, shim_kernels
from rwkv_peft.ops.recurrence import groups
from rwkv_peft.ops.wkv7 import cuda, wkv7
from rwkv_peft.ops.wkv7.op import WKV7

LENGTHS = (1, 2, 15, 16, 17, 64, 100, 257)
HEAD_SIZES = (128, 8, 20, 64)
DTYPES = (torch.bfloat16, torch.float32)
# Of groups of 64 tokens: B, the lengths of packed sequences, decays, whether all tokens share a direction, and a state.
SPLIT_CASES = [
    (2, None, "none", False, True),
    (1, None, "none", True, True),
    (1, [1, 130, 64, 65], "mixed", False, True),
    (1, [200], "strong", False, True),
    (1, None, "usual", False, False),
]
# Every value of every parameter, in rotation, rather than every combination.
CASES = [(T, HEAD_SIZES[i % 4], tuple(cases.DECAYS)[(i // 2) % 4]) for i, T in enumerate(LENGTHS)]
CASES += [(T, 64, tuple(cases.DECAYS)[i % 4]) for i, T in enumerate(LENGTHS) if T not in (16, 257)]


@pytest.fixture(scope="module", autouse=True)
def quiet_torch():
    with one_torch_thread():
        yield


@pytest.fixture(scope="module", params=DEVICES)
def run(request):
    """case -> the kernels' results, on the CPU or on the GPU."""
    return runner("wkv7", request.param)


def check(run, case):
    """Every result is within twice plain torch's error in the same precision, plus some roundings of its scale."""
    true, plain, ours = (dict(zip(cases.RESULTS, compute(case))) for compute in (cases.truth, cases.plain, run))
    assert ours.keys() == true.keys()
    for name, x in ours.items():
        assert x.shape == true[name].shape
        bound = 2 * error(plain[name], true[name]) + 32 * torch.finfo(torch.float32).eps * rms(true[name])
        found = error(x, true[name])
        assert found <= bound, f"{name}: error {found:.2e}, bound {bound:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("T, N, decay", CASES)
def test_results_and_gradients_match_the_reference(run, T, N, decay, dtype):
    B, H = (1, 1) if T > 64 else (1 + T % 3, 1 + (T + N // 8) % 3)
    check(run, cases.make_case((B, T, H, N), dtype, decay=decay, with_state=T % 2 == 1 or T == 64, seed=T + N))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("N", [4, 36, 64])
def test_tokens_that_take_away_what_the_one_before_wrote(run, N, dtype):
    """The worst triangular system of a chunk: all tokens have one key, and nothing fades."""
    check(run, cases.make_case((1, 40, 2, N), dtype, decay="none", repeated=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("N", [12, 64])
def test_packed_sequences_are_independent(run, N, dtype):
    lengths = [1, 17, 64, 33, 3]
    check(run, cases.make_case((1, sum(lengths), 2, N), dtype, lengths=lengths, seed=N))


@pytest.mark.parametrize("B, lengths, decay, repeated, with_state", SPLIT_CASES)
def test_split_time_is_as_exact_as_the_whole(run, B, lengths, decay, repeated, with_state):
    """At both ends of the decays' range, and in a case in which nothing fades and a group removes one direction."""
    T = 129 if lengths is None else sum(lengths)
    kinds = dict(decay=decay, repeated=repeated, with_state=with_state)
    case = cases.make_case((B, T, 1, 64), torch.bfloat16, lengths=lengths, seed=T, **kinds)
    check(lambda case: run(case, group=64), case)


def test_groups_are_launched_in_their_order(monkeypatch):
    recorder = toolchain.record(cuda.FAMILY, monkeypatch)
    cases.run(cuda.FAMILY.kernels(0), cases.make_case((2, 130, 3, 64), torch.bfloat16), group=64)
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
        (1, 8192, 32, 2, 1408),  # packed, of which each may leave a place unused
        (8, 4096, 32, 8, 0),  # the blocks are enough as they are
        (1, 4096, 128, 1, 0),  # 2 groups would not pay
        (1, 256, 12, 1, 0),  # nor would 3 as short as these
    ],
)
def test_time_is_split_where_that_pays(B, T, H, sequences, group):
    resident = 264  # two blocks on each of an H100's multiprocessors
    assert groups.choose_group(B, T, H, sequences, resident) == group
    assert H * groups.places(B, T, sequences, group) <= resident


def test_only_the_chunked_kernels_on_a_gpu_split_time(monkeypatch):
    monkeypatch.setattr(groups, "resident_blocks", lambda *_: 264)
    for N, dtype, on_gpu, expected in (
        (64, torch.bfloat16, True, 1024),
        (64, torch.float32, True, 0),
        (32, torch.bfloat16, True, 0),
        (64, torch.bfloat16, False, 0),  # where memory is planned without a GPU
    ):
        r = SimpleNamespace(is_cuda=on_gpu, dtype=dtype, shape=(1, 4096, 64, N), device=torch.device("cuda", 0))
        assert cuda.RECURRENCE.group_of(r, 1) == expected


@pytest.mark.parametrize(
    "bounds, N, group", [(None, 8, 0), ((0, 20, 50), 8, 0), (None, 64, 64), ((0, 20, 150), 64, 64)]
)
def test_the_operation_calls_them(monkeypatch, bounds, N, group):
    """wkv7 itself, and torch's operators and derivatives below it, as on a GPU."""
    monkeypatch.setattr(WKV7.backends, "choose", lambda *_: "cuda")
    kernels = shim_kernels("wkv7")
    monkeypatch.setattr(cuda.FAMILY, "kernels", lambda device: kernels)
    monkeypatch.setattr(cuda.RECURRENCE, "group_of", lambda *_: group)
    lengths = None if bounds is None else [b - a for a, b in zip(bounds, bounds[1:])]
    T, dtype = 80 if bounds is None else bounds[-1], torch.bfloat16 if group else torch.float32
    case = cases.make_case((1, T, 2, N), dtype, lengths=lengths)

    def compute(case):
        leaves = [x.clone().requires_grad_() for x in (*case.inputs, case.state)]
        y, final = wkv7(*leaves, cu_seqlens=case.cu_seqlens)
        torch.autograd.backward([y, final], [case.gy, case.gfinal])
        return y.detach(), final.detach(), *(x.grad for x in leaves)

    check(compute, case)
    assert wkv7(*case.inputs, case.state, case.cu_seqlens)[0].grad_fn is None
    kept = cuda.RECURRENCE.forward(*case.inputs, case.state, case.cu_seqlens, save=True)[2]
    assert kept.shape[0] == cuda.RECURRENCE.checkpoint_count(case.r, case.state.shape[0])


@pytest.mark.parametrize("reason, chosen", [(None, "cuda"), ("no driver; install one", "chunked")])
@pytest.mark.filterwarnings("ignore:wkv7 takes backend 'chunked', which is slow.*no driver")
def test_what_auto_takes_on_a_gpu(monkeypatch, reason, chosen):
    monkeypatch.setattr(cuda.FAMILY, "unavailable", lambda: reason)
    assert WKV7.backends._resolve_auto("cuda", torch.bfloat16) == chosen
