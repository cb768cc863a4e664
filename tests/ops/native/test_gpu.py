"""Kernels that were built are tried once on their GPU; if that fails, the next compiler's are. Compilers and GPU are
stand-ins."""

from contextlib import nullcontext

import pytest
import torch

from rwkv_peft.ops.native import gpu
from rwkv_peft.ops.native.compilers import architecture_for, nvcc_architectures
from rwkv_peft.ops.native.library import BuildError


class Compiler:
    """An NVRTC of a version, whose architectures are those of CUDA 12.8."""

    architectures = ("80", "86", "87", "89", "90", "100", "101", "120")

    def __init__(self, version):
        self.version = version


@pytest.fixture
def build(monkeypatch):
    """build(nvcc, nvrtcs, bad, stale) -> (the kernels, the compilers that were tried). nvcc: True if it is
    installed; nvrtcs: the versions of NVRTC; code of `bad` compilers does not launch, cached code of `stale` ones does
    not load."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def run(nvcc=True, nvrtcs=("13.0",), bad=(), stale=()):
        def find_nvcc():
            if not nvcc:
                raise BuildError("no nvcc")
            return "nvcc"

        def cubin(name, source, architecture, compiler, anew=False):
            assert architecture == "sm_90"
            return f"{compiler.version} anew" if anew else compiler.version

        monkeypatch.setattr(gpu, "find_nvcc", find_nvcc)
        monkeypatch.setattr(gpu, "nvcc_architectures", lambda _: ["80", "90"])
        monkeypatch.setattr(gpu, "recipe", lambda *_: ())
        monkeypatch.setattr(gpu, "build_library", lambda *_: "nvcc")
        monkeypatch.setattr(gpu.nvrtc, "compilers", lambda: map(Compiler, nvrtcs))
        monkeypatch.setattr(gpu.nvrtc, "cubin", cubin)
        tried = []

        def trial(kernels):
            tried.append(kernels)
            if kernels in bad:
                raise RuntimeError("launching failed with CUDA error 35")

        def load(image):
            if image in stale:
                raise BuildError(f"cuModuleLoadData failed with CUDA error 222 of {image}")
            return image

        return gpu.build_kernels("name", "name.cu", 0, str, load, trial), tried

    return run


def test_a_launch_that_works_is_enough(build):
    assert build() == ("nvcc", ["nvcc"])
    assert build(nvcc=False) == ("13.0", ["13.0"])


def test_code_that_a_driver_refuses_gives_way_to_the_next_compilers(build):
    assert build(bad=["nvcc"]) == ("13.0", ["nvcc", "13.0"])
    assert build(nvcc=False, nvrtcs=("12.8", "13.0"), bad=["12.8"]) == ("13.0", ["12.8", "13.0"])


def test_code_that_does_not_load_is_compiled_anew_and_then_by_the_next_compiler(build):
    assert build(nvcc=False, stale=["13.0"]) == ("13.0 anew", ["13.0 anew"])
    both = ["12.8", "12.8 anew"]
    assert build(nvcc=False, nvrtcs=("12.8", "13.0"), stale=both) == ("13.0", ["13.0"])


@pytest.mark.parametrize(
    "settings, messages",
    [
        (dict(nvrtcs=(), bad=["nvcc"]), [r"error 35 \(nvcc's code; it may be newer than the driver\)"]),
        (dict(bad=["nvcc", "13.0"]), [r"error 35 \(nvcc's", r"error 35 \(NVRTC 13.0\); see nvidia-smi"]),
        (dict(nvcc=False, stale=["13.0", "13.0 anew"]), ["no nvcc", "cuModuleLoadData failed with CUDA error 222"]),
        (dict(nvcc=False, nvrtcs=()), ["no nvcc"]),
    ],
)
def test_where_nothing_works_every_reason_is_told(build, settings, messages):
    with pytest.raises(BuildError) as raised:
        build(**settings)
    for message in messages:
        raised.match(message)


@pytest.mark.parametrize(
    "capability, known, expected",
    [
        ((9, 0), Compiler.architectures, "90"),
        ((10, 3), Compiler.architectures, "100"),  # 101 is a Jetson's
        ((12, 1), Compiler.architectures, "120"),
        ((8, 9), ("80", "86", "87"), "86"),  # so is 87
        ((8, 7), ("80", "86", "87"), "87"),
        ((12, 0), ("120", "121"), "120"),
    ],
)
def test_a_card_runs_the_latest_code_before_its_own_of_its_major_version(capability, known, expected):
    assert architecture_for(capability, known, "nvcc") == expected


@pytest.mark.parametrize("capability, known", [((12, 0), ("90", "100", "121")), ((8, 7), ("80", "86")), ((13, 0), ())])
def test_a_card_that_a_compiler_has_no_code_for_is_named(capability, known):
    words = "nvcc does not compile for compute capability {}.{}; install a newer CUDA".format(*capability)
    with pytest.raises(BuildError, match=words):
        architecture_for(capability, known, "nvcc")


def program(folder, text):
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_nvcc_says_what_it_compiles_for(tmp_path):
    nvcc = program(tmp_path, '[ "$1" = --list-gpu-code ] && printf "sm_80\\nsm_90\\nsm_103\\n"')
    assert nvcc_architectures(nvcc) == ["80", "90", "103"]
    old = program(tmp_path, "echo nvcc fatal: Unknown option >&2; exit 1")
    with pytest.raises(BuildError, match="--list-gpu-code failed: nvcc fatal: Unknown option; install CUDA"):
        nvcc_architectures(old)


def test_each_card_is_judged_by_itself(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["an H100", "a T4"][index])
    assert gpu.unavailable(0) is None
    assert "a T4 has compute capability 7.5" in gpu.unavailable(1) == gpu.unavailable()
