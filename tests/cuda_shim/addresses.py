"""Does a CUDA kernel leave its tensors' memory? Runs a family's on the CPU under the address sanitizer.

    LD_PRELOAD=$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \\
        python tests/cuda_shim/addresses.py wkv6|wkv7|mix|bone|cross_entropy|short

The process aborts at the first access outside a tensor; "short" gives cross_entropy a tensor that is too small. Prints
the kernels that no case runs.
"""

import sys
from pathlib import Path

import kernel_cases
import shim
import torch
from mutate import FAMILIES

GUARDS = ("-O1", "-fsanitize=address")


def main():
    torch.set_num_threads(1)
    name, cache = sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None
    family, results = FAMILIES["cross_entropy" if name == "short" else name]
    kernels, launched = shim.build(family, cache=cache, guards=GUARDS), set()
    run = kernels.run
    kernels.run = lambda name, *rest: launched.add(name) or run(name, *rest)
    if name == "short":
        logits, targets = torch.zeros(3, 64), torch.zeros(3, dtype=torch.int64)
        tensors = dict(logits=logits, targets=targets, losses=torch.empty(2))
        kernel_cases.cross_entropy_cuda.call(logits, tensors, kernels, vocabulary=64, scale=1.0, pull=0.0)
    results(kernels)
    print(*sorted({*family.module.args[0]} - launched))


if __name__ == "__main__":
    main()
