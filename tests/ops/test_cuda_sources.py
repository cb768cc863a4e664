"""CUDA's sources: NVRTC takes every family without spills, a cached build depends on all that decides it, and under the
address sanitizer no kernel leaves its tensors' memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_shim.shim import FAMILIES
from rwkv_peft.ops.native import cuda
from rwkv_peft.ops.native.build import BuildError, find_compiler, included_files, source_directory

OLDEST = "80"  # architecture; none before it has cp.async and bfloat16
COMPILED = [(op, architecture) for op in FAMILIES for architecture in (OLDEST, "100")]
COMPILED += [(op, architecture) for op in ("wkv6", "wkv7") for architecture in ("86", "89", "90", "120")]  # spill first
# kernels that may spill, because they seldom run
SELDOM = tuple(name for name in FAMILIES["mix"].names if name.endswith("float32"))
TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("op, architecture", COMPILED)
def test_nvrtc_compiles_every_kernel_without_spills(op, architecture, tmp_path, monkeypatch):
    compiler, family = next(cuda.compilers(), None), FAMILIES[op]
    if compiler is None:
        pytest.skip("needs NVRTC: pip install nvidia-cuda-nvrtc")
    if architecture not in compiler.architectures:
        pytest.skip(f"NVRTC {compiler.version} does not compile for {architecture}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda, "OPTIONS", (*cuda.OPTIONS, "--ptxas-options=-v"))
    text, logs = cuda._text, []

    def logged(nvrtc, program, what):
        logs.append(text(nvrtc, program, "ProgramLog").decode())
        return text(nvrtc, program, what)

    monkeypatch.setattr(cuda, "_text", logged)
    image = cuda.cubin(op, family.source, f"sm_{architecture}", compiler)
    for name in family.names:
        # what a launch asks of it
        assert name.encode() in image and f"{name}_threads".encode() in image and f"{name}_shared".encode() in image
        report = rf"Function properties for {name}\n[\s.ptxas]*?(\d+) bytes stack frame, (\d+) bytes spill stores"
        found = re.search(report, logs[0])
        assert found, f"no report on {name}"
        assert name in SELDOM or found.groups() == ("0", "0"), f"{name} uses local memory: {found.group()}"
    monkeypatch.setattr(cuda, "_compile", None)  # the second time from the cache
    assert cuda.cubin(op, family.source, f"sm_{architecture}", compiler) == image


@pytest.mark.parametrize("op", FAMILIES)
def test_every_header_counts_for_the_cache(op):
    root = source_directory("cuda")
    source = root / FAMILIES[op].source
    headers = set(included_files(source, root))
    assert headers >= set((root / op).glob("*.cuh"))
    for path in (source, *headers):
        assert headers >= {root / name for name in re.findall(r'#include "(.+)"', path.read_text(encoding="utf-8"))}


def test_every_kernel_stays_inside_its_tensors_and_a_tensor_that_is_too_small_is_noticed(tmp_path):
    try:
        said = subprocess.run([find_compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    except BuildError as error:
        pytest.skip(str(error))
    library = said.stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    environment = os.environ | {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "cuda_shim.addresses", str(tmp_path), *FAMILIES, "short"]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    told = "".join(f"{family}:\n" for family in FAMILIES)  # behind a name: kernels that no case runs
    assert done.stdout == f"{told}short:", done.stdout + done.stderr
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
