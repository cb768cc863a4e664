"""NVRTC takes every family of CUDA kernels, and a cached build depends on all that decides it."""

import re

import pytest

from cuda_shim import toolchain
from rwkv_peft.ops.bone import cuda as bone
from rwkv_peft.ops.cross_entropy import cuda as cross_entropy
from rwkv_peft.ops.decode import cuda as decode
from rwkv_peft.ops.mix import cuda as mix
from rwkv_peft.ops.native import cuda as nvrtc_compiler
from rwkv_peft.ops.native.build import included_files, source_directory
from rwkv_peft.ops.wkv6 import cuda as wkv6
from rwkv_peft.ops.wkv7 import cuda as wkv7

OLDEST = "80"  # architecture
# a family -> its kernels, and those of them that may spill: what is seldom run
FAMILIES = {
    wkv6.FAMILY: (wkv6.RECURRENCE.names, wkv6.RECURRENCE.plain),
    wkv7.FAMILY: (wkv7.RECURRENCE.names, wkv7.RECURRENCE.plain),
    mix.FAMILY: (mix.KERNELS, [name for name in mix.KERNELS if name.endswith("float32")]),
    bone.FAMILY: (bone.KERNELS, ()),
    cross_entropy.FAMILY: (cross_entropy.KERNELS, ()),
    decode.FAMILY: (decode.KERNELS, ()),
}


@pytest.fixture(params=FAMILIES, ids=lambda family: family.op)
def family(request):
    return request.param


def test_nvrtc_compiles_every_kernel_without_spills(family, tmp_path, monkeypatch):
    compiler = next(nvrtc_compiler.compilers(), None)
    if compiler is None:
        pytest.skip("needs NVRTC: pip install nvidia-cuda-nvrtc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc_compiler, "OPTIONS", (*nvrtc_compiler.OPTIONS, "--ptxas-options=-v"))
    text, logs = nvrtc_compiler._text, []

    def logged(nvrtc, program, what):
        logs.append(text(nvrtc, program, "ProgramLog").decode())
        return text(nvrtc, program, what)

    monkeypatch.setattr(nvrtc_compiler, "_text", logged)
    kernels, seldom = FAMILIES[family]
    image = nvrtc_compiler.cubin(family.op, family.source, f"sm_{OLDEST}", compiler)
    toolchain.check_without_spills(logs[0], [name for name in kernels if name not in seldom])
    for name in kernels:  # and what a launch asks of it
        assert name.encode() in image and f"{name}_threads".encode() in image and f"{name}_shared".encode() in image
    monkeypatch.setattr(nvrtc_compiler, "_compile", None)  # the second time from the cache
    assert nvrtc_compiler.cubin(family.op, family.source, f"sm_{OLDEST}", compiler) == image


def test_every_header_counts_for_the_cache(family):
    root = source_directory("cuda")
    headers = set(included_files(root / family.source, root))
    assert headers >= set((root / family.op).glob("*.cuh"))
    for path in (root / family.source, *headers):
        assert headers >= {root / name for name in re.findall(r'#include "(.+)"', path.read_text(encoding="utf-8"))}
