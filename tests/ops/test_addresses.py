"""Under the address sanitizer, no CUDA kernel leaves its tensors' memory, and the cases run all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_peft.ops.native.build import BuildError, find_compiler

TESTS = Path(__file__).resolve().parents[1]
FAMILIES = ("wkv6", "wkv7", "mix", "bone", "cross_entropy", "decode")


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
