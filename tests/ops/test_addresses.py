"""Under the address sanitizer, no CUDA kernel leaves its tensors' memory, and the cases run all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_peft.ops.native.compilers import find_compiler
from rwkv_peft.ops.native.errors import BuildError

PROGRAM = Path(__file__).resolve().parents[1] / "cuda_shim" / "addresses.py"


def guarded(name, folder):
    """The finished process of addresses.py."""
    try:
        said = subprocess.run([find_compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    except BuildError as error:
        pytest.skip(str(error))
    library = said.stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    environment = os.environ | {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, str(PROGRAM), name, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("family", ["wkv6", "wkv7", "mix", "bone", "cross_entropy"])
def test_every_kernel_stays_inside_its_tensors(family, tmp_path):
    done = guarded(family, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\n", "kernels that no case runs"


def test_a_tensor_that_is_too_small_is_noticed(tmp_path):
    done = guarded("short", tmp_path)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
