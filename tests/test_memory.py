"""Freed memory stays with the process: it is handed out again without the kernel's help."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from rwkv_peft.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(2**24).fill_(1.0)  # 64 MiB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
assert keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a glibc setting")
def test_pages_are_not_made_anew():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    if before < 20 * 100:
        pytest.skip("the system gives huge pages, or freed blocks were kept already")
    assert after < before / 10
