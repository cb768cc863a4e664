"""Kernels that were built are tried once on their GPU; where that fails, the other compiler's are. Compilers and GPU
are stand-ins."""

from contextlib import nullcontext

import pytest
import torch

from rwkv_peft.ops.native import gpu
from rwkv_peft.ops.native.errors import BuildError


@pytest.fixture
def build(monkeypatch):
    """build(nvcc, nvrtc, bad) -> (the kernels, those that were tried): each compiler is there or not, and launches of
    the `bad` ones' code fail."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def run(nvcc=True, nvrtc=True, bad=()):
        def find_nvcc():
            if not nvcc:
                raise BuildError("no nvcc")
            return "nvcc"

        monkeypatch.setattr(gpu, "find_nvcc", find_nvcc)
        monkeypatch.setattr(gpu, "recipe", lambda *_: ())
        monkeypatch.setattr(gpu, "build_library", lambda *_: "a library")
        monkeypatch.setattr(gpu.nvrtc, "find_nvrtc", lambda: "NVRTC" if nvrtc else None)
        monkeypatch.setattr(gpu.nvrtc, "cubin", lambda *_: "a module")
        tried = []

        def trial(kernels):
            tried.append(kernels)
            if kernels in bad:
                raise RuntimeError("launching failed with CUDA error 35")

        return gpu.build_kernels("name", "name.cu", 0, str, str, trial), tried

    return run


def test_a_launch_that_works_is_enough(build):
    assert build() == ("a library", ["a library"])
    assert build(nvcc=False) == ("a module", ["a module"])


def test_code_that_a_driver_refuses_gives_way_to_nvrtcs(build):
    assert build(bad=["a library"]) == ("a module", ["a library", "a module"])


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(nvrtc=False, bad=["a library"]), r"error 35 \(nvcc's code; it may be newer than the driver\)"),
        (dict(bad=["a library", "a module"]), r"error 35 \(NVRTC's code\); see nvidia-smi"),
        (dict(nvcc=False, nvrtc=False), "no nvcc"),
    ],
)
def test_where_nothing_works_the_reason_is_told(build, settings, message):
    with pytest.raises(BuildError, match=message):
        build(**settings)
