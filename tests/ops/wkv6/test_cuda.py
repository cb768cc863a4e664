"""The CUDA kernels' source against the float64 reference: run on the CPU through tests/cuda_shim, and on a GPU if
there is one."""

import functools
from types import SimpleNamespace

import pytest
import torch

from cuda_shim import cases
from cuda_shim.running import DEVICES, one_torch_thread, runner, shim_kernels
from rwkv_peft.ops.recurrence.groups import choose_group, resident_blocks
from rwkv_peft.ops.wkv6 import cuda, wkv6
from rwkv_peft.ops.wkv6.op import WKV6

LENGTHS = (1, 2, 15, 16, 17, 64, 100, 257)
HEAD_SIZES = (8, 64, 128)
DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(scope="module", autouse=True)
def quiet_torch():
    with one_torch_thread():
        yield


@pytest.fixture(scope="module", params=DEVICES)
def run(request):
    """case -> the kernels' results, on the CPU or on the GPU."""
    return runner("wkv6", request.param)


def check(run, case, roundings=32 * torch.finfo(torch.float32).eps):
    """Every result is within twice plain torch's error in the same precision, plus `roundings` of its scale.

    If the true gw is near zero, its scale is that of k gk, because gw is a difference of such terms.
    """
    true, plain, ours = (dict(zip(cases.RESULTS, compute(case))) for compute in (cases.truth, cases.plain, run))
    assert ours.keys() == true.keys()
    for name, x in ours.items():
        assert x.shape == true[name].shape
        scale = cases.rms(true[name]) + (cases.rms(case.k * true["gk"]) if name == "gw" else 0.0)
        bound = 2 * cases.error(plain[name], true[name]) + roundings * scale
        error = cases.error(x, true[name])
        assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("N", HEAD_SIZES)
@pytest.mark.parametrize("T", LENGTHS)
def test_results_and_gradients_match_the_reference(run, T, N, dtype):
    B, H = 1 + T % 3, 1 + (T + N // 8) % 4
    if T > 100:
        B, H = 1, 1
    check(run, cases.make_case((B, T, H, N), dtype, with_state=T % 2 == 1 or T == 64, seed=T + N))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("N", HEAD_SIZES)
@pytest.mark.parametrize("decay", ["none", "all", "mix"])
def test_extreme_decays(run, decay, N, dtype):
    check(run, cases.make_case((2, 37, 2, N), dtype, decay=decay, seed=N))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("N", HEAD_SIZES)
def test_packed_sequences_are_independent(run, N, dtype):
    lengths = [1, 17, 64, 65, 3]
    check(run, cases.make_case((1, sum(lengths), 1, N), dtype, lengths=lengths, seed=N))


SPLIT_CASES = [  # B, T or the lengths of packed sequences, N, a group's tokens, decays, with a state
    (2, 200, 64, 64, "mix", True),
    (1, 161, 64, 128, "ordinary", False),
    (1, [1, 70, 64, 3, 200, 129], 64, 64, "none", True),
    (1, [300, 2, 17], 64, 128, "mix", True),
    (1, [100, 150], 64, 1024, "ordinary", False),
]


@pytest.mark.parametrize("B, lengths, N, group, decay, with_state", SPLIT_CASES)
def test_split_time_is_as_exact_as_the_whole(run, B, lengths, N, group, decay, with_state):
    packed = isinstance(lengths, list)
    T = sum(lengths) if packed else lengths
    kinds = dict(decay=decay, with_state=with_state, lengths=lengths if packed else None)
    check(functools.partial(run, group=group), cases.make_case((B, T, 2, N), torch.bfloat16, seed=N + group, **kinds))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
def test_the_operation_splits_time_where_a_gpu_is_not_filled(monkeypatch, dtype):
    """wkv6 itself, as on a GPU that holds eight blocks: those of its kernels that can take groups do."""
    monkeypatch.setattr(WKV6.backends, "choose", lambda *_: "cuda")
    fits = lambda r: choose_group(*r.shape[:3], 1, 8) if r.dtype == torch.bfloat16 else 0  # noqa: E731
    monkeypatch.setattr(cuda.RECURRENCE, "group_of", lambda r, _: fits(r))
    kernels = shim_kernels("wkv6")
    monkeypatch.setattr(cuda.FAMILY, "kernels", lambda device: kernels)
    launched, run_one = [], kernels.run
    kernels.run = lambda name, *arguments: launched.append(name) or run_one(name, *arguments)

    def compute(case):
        leaves = [x.detach().clone().requires_grad_() for x in (*case.inputs, case.state)]
        y, final = wkv6(*leaves)
        torch.autograd.backward([y, final], [case.gy, case.gfinal])
        return y.detach(), final.detach(), *(x.grad for x in leaves)

    check(compute, cases.make_case((1, 260, 2, 64), dtype))
    splits = {*cuda.SPLIT.names()}
    assert splits & {*launched} == (splits if dtype == torch.bfloat16 else set())


@pytest.mark.parametrize("capability, on_small, blocks", [((9, 0), 1, 264), ((8, 9), 2, 264), ((8, 9), 1, 132)])
def test_a_gpu_holds_two_blocks_a_multiprocessor_where_they_fit(monkeypatch, capability, on_small, blocks):
    properties = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert resident_blocks.__wrapped__(0, on_small) == blocks
