"""The CUDA kernels' source against the float64 reference: run on the CPU through tests/cuda_shim, and on the GPU where
there is one; and what nvcc says of it."""

import dataclasses
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch

from cuda_shim import cases, shim, toolchain
from rwkv_peft.ops.native import driver, gpu, launch
from rwkv_peft.ops.native import nvrtc as nvrtc_compiler
from rwkv_peft.ops.native.build import build_library
from rwkv_peft.ops.native.compilers import find_nvcc
from rwkv_peft.ops.native.errors import BuildError
from rwkv_peft.ops.native.sources import source_directory
from rwkv_peft.ops.wkv6 import cuda, nvrtc

LENGTHS = (1, 2, 15, 16, 17, 64, 100, 257)
HEAD_SIZES = (8, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float32)
DEVICES = ("shim", "gpu") if torch.cuda.is_available() else ("shim",)
HOT_KERNELS = ("wkv6_forward_32", "wkv6_forward_64", "wkv6_forward_128", "wkv6_backward_32", "wkv6_backward_64")


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """The references' many small operations gain nothing from more, and crawl on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def runner_on_shim():
    try:
        kernels = shim.build()
    except BuildError as error:
        pytest.skip(str(error))
    kernels.set_order("ascending")
    return lambda case: cases.run(kernels, case)


def run_on_gpu(case):
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    moved = cases.Case(**{name: None if x is None else x.cuda() for name, x in fields.items()})
    device = torch.cuda.current_device()
    results = cases.run(cuda.kernels(device), moved, torch.cuda.current_stream().cuda_stream)
    return tuple(x.cpu() for x in results)


@pytest.fixture(scope="module", params=DEVICES)
def run(request):
    """case -> the kernels' results, on the CPU or on the GPU."""
    return runner_on_shim() if request.param == "shim" else run_on_gpu


def check(run, case, roundings=32 * torch.finfo(torch.float32).eps):
    """Every result is within twice plain torch's error in the same precision, plus `roundings` of its scale.

    Where the true gw is near zero its scale is that of k gk, of which it is a difference.
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
    check(run, cases.make_case(B, T, H, N, dtype, with_state=T % 2 == 1 or T == 64, seed=T + N))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("N", HEAD_SIZES)
@pytest.mark.parametrize("decay", ["none", "all", "mix"])
def test_extreme_decays(run, decay, N, dtype):
    check(run, cases.make_case(2, 37, 2, N, dtype, decay=decay, seed=N))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("N", HEAD_SIZES)
def test_packed_sequences_are_independent(run, N, dtype):
    lengths = [1, 17, 64, 65, 3]
    check(run, cases.make_case(1, sum(lengths), 1, N, dtype, lengths=lengths, seed=N))


@pytest.mark.parametrize("N", [20, 64])
def test_an_empty_sequence_hands_its_state_on(run, N):
    case = cases.make_case(1, 30, 2, N, torch.bfloat16, lengths=[12, 0, 18])
    y, final, gr, gk, gv, gw, gu, gstate = run(case)
    assert torch.equal(final[1], case.state[1]) and torch.equal(gstate[1], case.gfinal[1])
    keep = torch.tensor([0, 2])
    without = dataclasses.replace(
        case, state=case.state[keep], gfinal=case.gfinal[keep], cu_seqlens=torch.tensor([0, 12, 30])
    )
    for x, expected in zip((y, final[keep], gr, gk, gv, gw, gu, gstate[keep]), run(without)):
        assert torch.equal(x, expected)


@pytest.mark.parametrize("N", [8, 64])
def test_no_tokens_hand_the_state_on(run, N):
    case = cases.make_case(2, 0, 2, N, torch.bfloat16)
    y, final, gr, gk, gv, gw, gu, gstate = run(case)
    assert y.shape == (2, 0, 2, N) and not gu.any()
    assert torch.equal(final, case.state) and torch.equal(gstate, case.gfinal)


@pytest.mark.parametrize("N", [12, 64])
@pytest.mark.parametrize("at", [16, 33])
def test_two_halves_with_the_state_carried_over_equal_the_whole(run, at, N):
    whole = cases.make_case(2, 70, 2, N, torch.bfloat16, seed=at)

    def part(span, state, gfinal):
        cut = {name: getattr(whole, name)[:, span].contiguous() for name in ("r", "k", "v", "w", "gy")}
        return dataclasses.replace(whole, **cut, state=state, gfinal=gfinal)

    middle = run(part(slice(0, at), whole.state, whole.gfinal))[1]
    second = run(part(slice(at, None), middle, whole.gfinal))
    first = run(part(slice(0, at), whole.state, second[-1]))
    y, final, gr, gk, gv, gw, gu, gstate = run(whole)
    joined = [torch.cat([a, b], dim=1) for a, b in zip(first, second)]
    for x, expected in zip(
        (*joined[:1], second[1], *joined[2:6], first[6] + second[6], first[7]), (y, final, gr, gk, gv, gw, gu, gstate)
    ):
        assert cases.error(x, expected.double()) <= 0.01 * cases.rms(expected)


def test_without_gradients_wanted_nothing_is_kept():
    case = cases.make_case(1, 130, 1, 64, torch.bfloat16)
    kernels = shim.build()
    inputs = (case.r, case.k, case.v, case.w, case.u, case.state, case.cu_seqlens)
    y, final, checkpoints = cuda.run_forward(kernels, None, *inputs, False)
    assert checkpoints.shape[0] == 0
    assert torch.equal(y, cases.run(kernels, case)[0])


@pytest.mark.parametrize("N", [8, 64])
def test_gradients_through_the_final_state_alone(N):
    case = cases.make_case(1, 40, 1, N, torch.bfloat16)
    zeros = dataclasses.replace(case, gy=torch.zeros_like(case.gy))
    kernels = shim.build()
    inputs = (case.r, case.k, case.v, case.w, case.u)
    y, final, checkpoints = cuda.run_forward(kernels, None, *inputs, case.state, None, True)
    gradients = cuda.run_backward(kernels, None, *inputs, None, checkpoints, None, case.gfinal)
    check(lambda _: (y, final, *gradients), zeros)


def test_inputs_off_the_16_byte_grid(run):
    case = cases.make_case(1, 20, 1, 64, torch.bfloat16)
    storage = torch.zeros(case.k.numel() + 1, dtype=torch.bfloat16)
    storage[1:] = case.k.flatten()
    shifted = dataclasses.replace(case, k=storage[1:].view(case.k.shape))
    assert shifted.k.data_ptr() % 16 != 0
    for x, expected in zip(run(shifted), run(case)):
        assert torch.equal(x, expected)


def test_what_a_kernel_is_given_lies_on_its_grid():
    shifted = torch.zeros(65)[1:]
    assert shifted.data_ptr() % 16 and launch.aligned(shifted).data_ptr() % 16 == 0
    inputs = {}

    class Recorded:
        @staticmethod
        def backward(arguments, stream):
            inputs.update({name: getattr(arguments._obj, name) for name in ("state", "gy", "gfinal", "r")})
            return 0

    case = cases.make_case(1, 20, 1, 8, torch.float32)
    gfinal = torch.cat([torch.zeros(1), case.gfinal.flatten()])[1:].view(case.gfinal.shape)
    rows = (case.r, case.k, case.v, case.w, case.u)
    cuda.run_backward(Recorded, None, *rows, None, torch.zeros(2, 1, 8, 8), None, gfinal)
    assert gfinal.data_ptr() % 16 and inputs["gfinal"] % 16 == 0 and inputs["gy"] % 16 == 0


@pytest.mark.parametrize("name", ["r", "k", "v", "w"])
def test_a_nan_is_not_hidden(run, name):
    case = cases.make_case(1, 20, 1, 64, torch.bfloat16)
    getattr(case, name)[0, 5, 0, 7] = float("nan")
    y, final, *_ = run(case)
    assert y[0, 5:].isnan().any()


@pytest.mark.parametrize("order", shim.ORDERS)
def test_the_order_of_the_threads_does_not_matter(order):
    kernels = shim.build()
    for N in (20, 64):
        case = cases.make_case(1, 100, 1, N, torch.bfloat16)
        kernels.set_order("ascending")
        expected = cases.run(kernels, case)
        kernels.set_order(order)
        for x, y in zip(cases.run(kernels, case), expected):
            assert torch.equal(x, y)


BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "wkv6.py"
BASELINE = BENCHMARK.with_name("wkv6_sequential.cu")


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
def test_the_benchmarks_baseline_computes_the_same(dtype):
    spec = importlib.util.spec_from_file_location("wkv6_benchmark", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    case = cases.make_case(2, 70, 2, 64, dtype, with_state=False)
    inputs = [x.clone().requires_grad_() for x in (case.r, case.k, case.v, case.w, case.u)]
    y = benchmark.Sequential.apply(shim.build(source=BASELINE), *inputs)
    y.backward(case.gy)
    true = cases.truth(case)
    found = (y, *(x.grad for x in inputs))
    for name, x, expected in zip(("y", "gr", "gk", "gv", "gw", "gu"), found, (true[0], *true[2:]), strict=True):
        assert cases.error(x, expected) <= 2 * torch.finfo(dtype).eps * cases.rms(expected) + 1e-5, name


@pytest.fixture(scope="module")
def nvcc():
    try:
        return find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def assembler_reports(nvcc, tmp_path_factory):
    """What ptxas says of each architecture, compiled side by side with warnings as errors."""
    return toolchain.assembler_reports(cuda.SOURCE, nvcc, tmp_path_factory.mktemp("cubin"))


@pytest.mark.parametrize("architecture", toolchain.ARCHITECTURES)
def test_nvcc_compiles_without_warnings_or_spills(assembler_reports, architecture):
    toolchain.check_without_spills(*assembler_reports[architecture], HOT_KERNELS)


@pytest.mark.parametrize("name, generation", [("wkv6_sequential", 6), ("kernel_driver", 6), ("kernel_driver", 7)])
def test_nvcc_compiles_what_the_benchmarks_bring(nvcc, tmp_path, name, generation):
    source = BASELINE.with_name(name + ".cu")
    (unit,), _, _ = gpu.recipe(source, nvcc, "90")
    command = [*unit.command, "-Werror", "all-warnings", f"-DGENERATION={generation}", "-cubin", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_failed_launch_is_an_error(nvcc, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("launches do not fail where there is a GPU")
    library = cuda.Library(build_library("wkv6_cuda_sm90", *gpu.recipe(cuda.SOURCE, nvcc, "90")))
    with pytest.raises(RuntimeError, match="CUDA error"):
        cases.run(library, cases.make_case(1, 4, 1, 64, torch.bfloat16))


def test_nvrtc_compiles_every_kernel(tmp_path, monkeypatch):
    compiler = nvrtc_compiler.find_nvrtc()
    if compiler is None:
        pytest.skip("needs NVRTC: pip install nvidia-cuda-nvrtc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    image = nvrtc_compiler.cubin("wkv6_cuda", cuda.SOURCE, "sm_90", compiler)
    for kernel in HOT_KERNELS:
        assert f"{kernel}_shared".encode() in image
    assert nvrtc_compiler.cubin("wkv6_cuda", cuda.SOURCE, "sm_90", None) == image  # the second time from the cache


def test_the_driver_is_asked_for_a_block_a_head_and_sequence(monkeypatch):
    recorder = toolchain.RecordingDriver(cuda.Arguments)
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: recorder)
    cases.run(nvrtc.Module(b"image"), cases.make_case(2, 5, 3, 64, torch.bfloat16), stream=7)
    cases.run(nvrtc.Module(b"image"), cases.make_case(2, 5, 3, 20, torch.bfloat16), stream=7)
    for recorded, block, shared in zip(recorder.launches, [(128, 1)] * 2 + [(20, 2)] * 2, [1234, 1234, 0, 0]):
        sizes, stream, arguments, extra = recorded
        assert sizes == [3 * 2, 1, 1, *block, 1, shared]
        assert stream == 7 and extra is None
        assert (arguments.sequences, arguments.length, arguments.heads) == (2, 5, 3)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("scalar", [0, 1])
@pytest.mark.parametrize("head_size", [20, 32, 64, 128])
def test_both_launchers_choose_the_same_kernel(direction, scalar, head_size):
    """nvrtc.plan against the C interface's own words."""
    source = (source_directory("cuda") / cuda.SOURCE).read_text(encoding="utf-8")
    body = source[source.index(f"int wkv6_{direction}(") :].split("\n}\n")[0]
    plain = re.search(r"FLOAT32\) return run_plain\((\w+),", body).group(1)
    chunked = dict(re.findall(r"case (\d+): return run_chunked\((\w+),", body))
    default = re.search(r"default: return run_plain\((\w+),", body).group(1)
    expected = plain if scalar == 0 else chunked.get(str(head_size), default)
    name, block = nvrtc.plan(direction, head_size, scalar)
    assert name == expected
    assert block == ((2 * head_size, 1, 1) if name in HOT_KERNELS else (head_size, (head_size + 15) // 16, 1))


def test_every_header_counts_for_the_cache():
    folders = [source_directory("cuda") / name for name in ("common", "wkv6")]
    assert set(gpu.recipe(cuda.SOURCE, "nvcc", "90")[2]) == {
        path for folder in folders for path in folder.glob("*.cuh")
    }


@pytest.mark.parametrize(
    "cuda_version, available, words", [(None, False, "CUDA build of torch"), ("13.0", False, "no NVIDIA GPU")]
)
def test_the_reason_why_it_is_unavailable(monkeypatch, cuda_version, available, words):
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert words in cuda.unavailable()


def test_an_old_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in dict(is_available=True, current_device=0, get_device_name="Tesla T4").items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "Tesla T4 has compute capability 7.5" in cuda.unavailable()
