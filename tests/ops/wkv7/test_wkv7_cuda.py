"""The CUDA kernels' source against the float64 reference: run on the CPU through tests/cuda_shim, and on the GPU where
there is one; and what nvcc says of it."""

import dataclasses
import re

import pytest
import torch

from cuda_shim import shim, toolchain
from cuda_shim import wkv7_cases as cases
from cuda_shim.cases import error, rms
from rwkv_peft.ops.native import driver
from rwkv_peft.ops.native import nvrtc as nvrtc_compiler
from rwkv_peft.ops.native.compilers import find_nvcc
from rwkv_peft.ops.native.errors import BuildError
from rwkv_peft.ops.native.sources import source_directory
from rwkv_peft.ops.wkv7 import cuda, nvrtc, op, wkv7

LENGTHS = (1, 2, 15, 16, 17, 64, 100, 257)
HEAD_SIZES = (128, 8, 20, 64)
DTYPES = (torch.bfloat16, torch.float32)
DEVICES = ("shim", "gpu") if torch.cuda.is_available() else ("shim",)
# Every value of every parameter, in rotation, rather than every combination.
CASES = [(T, HEAD_SIZES[i % 4], tuple(cases.DECAYS)[(i // 2) % 4]) for i, T in enumerate(LENGTHS)]
CASES += [(T, 64, tuple(cases.DECAYS)[i % 4]) for i, T in enumerate(LENGTHS) if T not in (16, 257)]


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """The references' many small operations gain nothing from more, and crawl on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shim_kernels():
    try:
        kernels = shim.build(cuda)
    except BuildError as error:
        pytest.skip(str(error))
    kernels.set_order("ascending")
    return kernels


def run_on_gpu(case):
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    moved = cases.Case(**{name: None if x is None else x.cuda() for name, x in fields.items()})
    device = torch.cuda.current_device()
    results = cases.run(cuda.kernels(device), moved, torch.cuda.current_stream().cuda_stream)
    return tuple(x.cpu() for x in results)


@pytest.fixture(scope="module", params=DEVICES)
def run(request, shim_kernels):
    """case -> the kernels' results, on the CPU or on the GPU."""
    return run_on_gpu if request.param == "gpu" else lambda case: cases.run(shim_kernels, case)


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


@pytest.mark.parametrize("N", [20, 64])
def test_an_empty_sequence_hands_its_state_on(run, N):
    case = cases.make_case(1, 30, 2, N, torch.bfloat16, lengths=[12, 0, 18])
    y, final, *gradients, gstate = run(case)
    assert torch.equal(final[1], case.state[1]) and torch.equal(gstate[1], case.gfinal[1])
    keep = torch.tensor([0, 2])
    without = dataclasses.replace(
        case, state=case.state[keep], gfinal=case.gfinal[keep], cu_seqlens=torch.tensor([0, 12, 30])
    )
    for x, expected in zip((y, final[keep], *gradients, gstate[keep]), run(without), strict=True):
        assert torch.equal(x, expected)


@pytest.mark.parametrize("N", [20, 64])
def test_nothing_is_read_before_it_is_written(run, N):
    """Results and checkpoints begin as NaN in torch's deterministic mode, shared memory does in the shim."""
    case = cases.make_case(1, 54, 2, N, torch.bfloat16, lengths=[1, 50, 3])
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        results = run(case)
    finally:
        torch.use_deterministic_algorithms(False)
    for x, expected in zip(results, run(case), strict=True):
        assert torch.equal(x, expected)


@pytest.mark.parametrize("N", [12, 64])
@pytest.mark.parametrize("at", [16, 33])
def test_two_halves_with_the_state_carried_over_equal_the_whole(run, at, N):
    whole = cases.make_case(2, 70, 2, N, torch.bfloat16, seed=at)

    def part(span, state, gfinal):
        cut = {name: getattr(whole, name)[:, span].contiguous() for name in (*cases.INPUTS, "gy")}
        return dataclasses.replace(whole, **cut, state=state, gfinal=gfinal)

    middle = run(part(slice(0, at), whole.state, whole.gfinal))[1]
    second = run(part(slice(at, None), middle, whole.gfinal))
    first = run(part(slice(0, at), whole.state, second[-1]))
    joined = [torch.cat([a, b], dim=1) for a, b in zip(first, second)]
    for x, expected in zip((joined[0], second[1], *joined[2:8], first[8]), run(whole), strict=True):
        assert error(x, expected.double()) <= 0.01 * rms(expected)


@pytest.mark.parametrize("N", [8, 64])
def test_without_gradients_wanted_nothing_is_kept(shim_kernels, N):
    case = cases.make_case(1, 70, 1, N, torch.bfloat16)
    y, final, checkpoints = cuda.run_forward(shim_kernels, None, *case.inputs, case.state, None, False)
    assert checkpoints.shape[0] == 0
    assert torch.equal(y, cases.run(shim_kernels, case)[0])


@pytest.mark.parametrize("N", [8, 64])
def test_gradients_through_the_final_state_alone(shim_kernels, N):
    case = cases.make_case(1, 40, 1, N, torch.bfloat16)
    zeros = dataclasses.replace(case, gy=torch.zeros_like(case.gy))
    y, final, checkpoints = cuda.run_forward(shim_kernels, None, *case.inputs, case.state, None, True)
    gradients = cuda.run_backward(shim_kernels, None, *case.inputs, None, checkpoints, None, case.gfinal)
    check(lambda _: (y, final, *gradients), zeros)


def test_inputs_off_the_16_byte_grid(run):
    case = cases.make_case(1, 20, 1, 64, torch.bfloat16)
    storage = torch.zeros(case.k.numel() + 1, dtype=torch.bfloat16)
    storage[1:] = case.k.flatten()
    shifted = dataclasses.replace(case, k=storage[1:].view(case.k.shape))
    assert shifted.k.data_ptr() % 16 != 0
    for x, expected in zip(run(shifted), run(case)):
        assert torch.equal(x, expected)


@pytest.mark.parametrize("N", [8, 64])
def test_a_nan_is_not_hidden(run, N):
    for name in cases.INPUTS:
        case = cases.make_case(1, 40, 1, N, torch.bfloat16)
        getattr(case, name)[0, 20, 0, 7] = float("nan")
        y, final, *_ = run(case)
        assert not y[0, :16].isnan().any() and y[0, 20].isnan().any()
        assert name == "r" or (y[0, 32:].isnan().any() and final.isnan().any())


@pytest.mark.parametrize("order", shim.ORDERS)
def test_the_order_of_the_threads_does_not_matter(order):
    kernels = shim.build(cuda)
    for N in (20, 64):
        case = cases.make_case(1, 60, 1, N, torch.bfloat16)
        kernels.set_order("ascending")
        expected = cases.run(kernels, case)
        kernels.set_order(order)
        for x, y in zip(cases.run(kernels, case), expected):
            assert torch.equal(x, y)


@pytest.mark.parametrize("bounds", [None, (0, 20, 50)])
def test_the_operation_calls_them(shim_kernels, monkeypatch, bounds):
    """wkv7 itself, and torch's operators and derivatives below it, as on a GPU."""
    monkeypatch.setattr(op, "_choose", lambda *_: "cuda")
    monkeypatch.setattr(cuda, "kernels", lambda device: shim_kernels)
    monkeypatch.setattr(cuda, "stream", lambda x: None)
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


@pytest.fixture(scope="module")
def nvcc():
    try:
        return find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def assembler_reports(nvcc, tmp_path_factory):
    """What ptxas says of each architecture."""
    return toolchain.assembler_reports(cuda.SOURCE, nvcc, tmp_path_factory.mktemp("cubin"))


@pytest.mark.parametrize("architecture", toolchain.ARCHITECTURES)
def test_nvcc_compiles_without_warnings_or_spills(assembler_reports, architecture):
    toolchain.check_without_spills(*assembler_reports[architecture], nvrtc.CHUNKED)


def test_nvrtc_compiles_every_kernel(tmp_path, monkeypatch):
    compiler = nvrtc_compiler.find_nvrtc()
    if compiler is None:
        pytest.skip("needs NVRTC: pip install nvidia-cuda-nvrtc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    image = nvrtc_compiler.cubin("wkv7_cuda", cuda.SOURCE, "sm_90", compiler)
    for name in (*nvrtc.CHUNKED, "wkv7_plain"):
        assert f"{name}_shared".encode() in image


def test_the_driver_is_asked_for_a_block_a_head_and_sequence(monkeypatch):
    recorder = toolchain.RecordingDriver(cuda.Arguments)
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: recorder)
    for N in (64, 20):
        cases.run(nvrtc.Module(b"image"), cases.make_case(2, 5, 3, N, torch.bfloat16), stream=7)
    for recorded, block in zip(recorder.launches, [(256, 1), (128, 1), (2, 32), (2, 32)], strict=True):
        sizes, stream, arguments, extra = recorded
        assert sizes == [3 * 2, 1, 1, *block, 1, 1234]
        assert stream == 7 and extra is None
        assert (arguments.sequences, arguments.length, arguments.heads) == (2, 5, 3)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_both_launchers_choose_the_same_kernel(direction):
    """nvrtc.plan against the C interface's own words."""
    source = (source_directory("cuda") / cuda.SOURCE).read_text(encoding="utf-8")
    body = source[source.index(f"int wkv7_{direction}(") :].split("\n}\n")[0]
    first, chunked, plain = re.findall(r"return run_\w+\((\w+),", body)
    assert f"{chunked}, {nvrtc.CHUNKED[chunked]}," in body
    assert re.search(r"scalar == FLOAT32\).*\n.*head_size == 64\)", body)
    for scalar, head_size, name in ((0, 64, first), (0, 20, first), (1, 64, chunked), (1, 20, plain), (1, 128, plain)):
        assert nvrtc.plan(direction, head_size, scalar)[0] == name
    for head_size, block in (
        (4, (1, 32)),
        (16, (1, 32)),
        (20, (2, 32)),
        (36, (4, 40)),
        (100, (8, 100)),
        (128, (8, 128)),
    ):
        assert nvrtc.plan(direction, head_size, 0)[1] == (*block, 1)
