"""The programs that scripts/gpu_check.sh runs under compute-sanitizer: nvcc compiles them without complaint, and the
address sanitizer finds no fault in their kernels on a CPU."""

import importlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from cuda_shim import shim
from rwkv_peft.ops.native import gpu
from rwkv_peft.ops.native.compilers import find_compiler, find_nvcc
from rwkv_peft.ops.native.errors import BuildError
from rwkv_peft.ops.native.sources import source_directory

DRIVER = Path(__file__).resolve().parents[2] / "benchmarks" / "kernel_driver"


@pytest.mark.parametrize("generation", [6, 7])
def test_nvcc_has_no_complaint(tmp_path, generation):
    """nvcc takes the host's code and the device's syntax of the programs that no other test compiles."""
    try:
        nvcc = find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))
    command = [nvcc, *gpu.NVCC_FLAGS, "-arch=sm_90", "-Werror", "all-warnings", "-fdevice-syntax-only"]
    command += [f"-DGENERATION={generation}", f"-I{source_directory('cuda')}"]
    command += ["-c", str(DRIVER / "recurrence.cu"), "-o", str(tmp_path / "driver.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["mix", "bone", "cross_entropy"])
def test_every_kernel_stays_inside_its_tensors(tmp_path, name):
    """Each tensor of a case has memory of exactly its size, and all results are written. The recurrences' programs take
    too long here; tests/ops shows that their kernels read nothing before it is written."""
    source, program = DRIVER / f"{name}.cu", tmp_path / name
    flags = ("-std=c++17", "-O0", "-fsanitize=address", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-pthread")
    folders = (f"-I{Path(shim.__file__).parent}", f"-I{source_directory('cuda')}")
    try:
        command = [find_compiler(), *flags, *folders, "-x", "c++", str(source), "-o", str(program)]
    except BuildError as error:
        pytest.skip(str(error))
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip("the compiler has no address sanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert cases and all(case["right"] for case in cases)


@pytest.mark.parametrize("family", ["mix", "bone", "cross_entropy"])
def test_a_program_launches_every_kernel_of_its_family(family):
    """Compared by the names in its source, or those that it composes: NAME_float32 and NAME_bfloat16, or NAME_RANK."""
    source = (DRIVER / f"{family}.cu").read_text(encoding="utf-8")
    for kernel in importlib.import_module(f"rwkv_peft.ops.{family}.cuda").KERNELS:
        name = re.sub(r"_(float32|bfloat16|\d+)$", "", kernel)
        assert name.removeprefix(f"{family}_") in source, kernel
