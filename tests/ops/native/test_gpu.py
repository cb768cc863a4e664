"""Kernels for a GPU are those of the first compiler whose code the driver loads. Compilers and GPU are stand-ins."""

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from rwkv_peft.ops.native import cuda as families
from rwkv_peft.ops.native.build import BuildError
from rwkv_peft.ops.native.cuda import Nvrtc

CUDA_12_8 = ("80", "86", "87", "89", "90", "100", "101", "120")


def compiler(version, architectures=CUDA_12_8):
    made = Nvrtc.__new__(Nvrtc)
    made.version, made.architectures = version, architectures
    return made


class Arguments(ctypes.Structure):
    _fields_ = [("sizes", ctypes.c_int)]


@pytest.fixture
def build(monkeypatch):
    """build(nvrtcs, stale) -> the code whose kernels are taken. nvrtcs: the versions of NVRTC; code of `stale` ones
    does not load."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def run(nvrtcs=("13.0",), stale=()):
        def cubin(name, source, architecture, compiler, anew=False):
            assert (name, source, architecture) == ("op_cuda", "op/op.cu", "sm_90")
            return f"{compiler.version} anew" if anew else compiler.version

        def load(names, image):
            if image in stale:
                raise BuildError(f"cuModuleLoadData failed with CUDA error 222 of {image}")
            return image

        monkeypatch.setattr(families, "compilers", lambda: map(compiler, nvrtcs))
        monkeypatch.setattr(families, "cubin", cubin)
        monkeypatch.setattr(families, "Kernels", load)
        return families.CudaFamily("op", (), Arguments).kernels(0)

    return run


def test_code_that_does_not_load_is_compiled_anew_and_then_by_the_next_compiler(build):
    assert build() == "13.0"
    assert build(stale=["13.0"]) == "13.0 anew"
    assert build(nvrtcs=("12.8", "13.0"), stale=["12.8", "12.8 anew"]) == "13.0"


def test_where_nothing_works_every_reason_is_told(build):
    with pytest.raises(BuildError, match="NVRTC 12.8: .* error 222 of 12.8 anew\nNVRTC 13.0: .* of 13.0 anew"):
        build(nvrtcs=("12.8", "13.0"), stale=["12.8", "12.8 anew", "13.0", "13.0 anew"])
    with pytest.raises(BuildError, match="no NVRTC.*; pip install nvidia-cuda-nvrtc"):
        build(nvrtcs=())


def test_a_failed_launch_is_an_error(monkeypatch):
    family, failing = families.CudaFamily("op", (), Arguments), SimpleNamespace(run=lambda *_: 700)
    monkeypatch.setattr(family, "kernels", lambda device: failing)
    with pytest.raises(RuntimeError, match="op: launching the CUDA kernel op_kernel failed with CUDA error 700"):
        family.run("op_kernel", torch.zeros(1), {}, 1)


@pytest.mark.parametrize(
    "capability, known, expected",
    [
        ((9, 0), CUDA_12_8, "90"),
        ((10, 3), CUDA_12_8, "100"),  # 101 is a Jetson's
        ((12, 1), CUDA_12_8, "120"),
        ((8, 9), ("80", "86", "87"), "86"),  # so is 87
        ((8, 7), ("80", "86", "87"), "87"),
        ((12, 0), ("120", "121"), "120"),
    ],
)
def test_a_card_runs_the_latest_code_before_its_own_of_its_major_version(capability, known, expected):
    assert compiler("12.8", known).architecture_for(capability) == expected


@pytest.mark.parametrize("capability, known", [((12, 0), ("90", "100", "121")), ((8, 7), ("80", "86")), ((13, 0), ())])
def test_a_card_that_a_compiler_has_no_code_for_is_named(capability, known):
    words = "it does not compile for compute capability {}.{}; install a newer CUDA".format(*capability)
    with pytest.raises(BuildError, match=words):
        compiler("12.8", known).architecture_for(capability)


def test_each_card_is_judged_by_itself(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["an H100", "a T4"][index])
    assert families.misfit(0) is None
    assert "a T4 has compute capability 7.5" in families.misfit(1) == families.misfit()
