"""The CUDA kernels' source against the float64 reference: run on the CPU through tests/cuda_shim, and on the GPU where
there is one."""

import pytest
import torch

from cuda_shim import wkv7_cases as cases
from cuda_shim.cases import error, rms
from cuda_shim.running import DEVICES, one_torch_thread, runner, shim_kernels
from rwkv_peft.ops.wkv7 import cuda, op, wkv7

LENGTHS = (1, 2, 15, 16, 17, 64, 100, 257)
HEAD_SIZES = (128, 8, 20, 64)
DTYPES = (torch.bfloat16, torch.float32)
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
    check(run, cases.make_case(B, T, H, N, dtype, decay=decay, with_state=T % 2 == 1 or T == 64, seed=T + N))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("N", [4, 36, 64])
def test_tokens_that_take_away_what_the_one_before_wrote(run, N, dtype):
    """The chunk's triangular system at its worst: all tokens have one key, and nothing fades."""
    check(run, cases.make_case(1, 40, 2, N, dtype, decay="none", repeated=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("N", [12, 64])
def test_packed_sequences_are_independent(run, N, dtype):
    lengths = [1, 17, 64, 33, 3]
    check(run, cases.make_case(1, sum(lengths), 2, N, dtype, lengths=lengths, seed=N))


@pytest.mark.parametrize("bounds", [None, (0, 20, 50)])
def test_the_operation_calls_them(monkeypatch, bounds):
    """wkv7 itself, and torch's operators and derivatives below it, as on a GPU."""
    monkeypatch.setattr(op, "_choose", lambda *_: "cuda")
    kernels = shim_kernels("wkv7")
    monkeypatch.setattr(cuda.RECURRENCE, "kernels", lambda device: kernels)
    lengths = None if bounds is None else [b - a for a, b in zip(bounds, bounds[1:])]
    case = cases.make_case(1, 50, 2, 8, torch.float32, lengths=lengths)

    def compute(case):
        leaves = [x.clone().requires_grad_() for x in (*case.inputs, case.state)]
        y, final = wkv7(*leaves, cu_seqlens=case.cu_seqlens)
        torch.autograd.backward([y, final], [case.gy, case.gfinal])
        return y.detach(), final.detach(), *(x.grad for x in leaves)

    check(compute, case)
    assert wkv7(*case.inputs, case.state, case.cu_seqlens)[0].grad_fn is None


@pytest.mark.parametrize("reason, chosen", [(None, "cuda"), ("no driver; install one", "chunked")])
@pytest.mark.filterwarnings("ignore:wkv7 takes backend 'chunked', which is slow. no driver")
def test_what_auto_takes_on_a_gpu(monkeypatch, reason, chosen):
    monkeypatch.setattr(cuda, "unavailable", lambda level="": reason)
    assert op._resolve_auto("cuda", torch.bfloat16) == chosen
