"""Does a CUDA kernel leave its tensors' memory? Runs families of them on the CPU under the address sanitizer.

    cd tests && LD_PRELOAD=$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \\
        python -m cuda_shim.addresses FOLDER [wkv6|wkv7|mix|bone|cross_entropy|decode|short …]

FOLDER keeps what is built; without names all families but "short" run, which gives cross_entropy a tensor that is too
small. The process aborts at the first access outside a tensor. Prints a line for each family: its name, and the kernels
that no case runs.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import torch

from cuda_shim.kernel_cases import RESULTS
from cuda_shim.shim import FAMILIES, build
from rwkv_peft.ops import cross_entropy

GUARDS = ("-Og", "-fsanitize=address")  # which compile in half the time of -O1


def main():
    torch.set_num_threads(1)
    cache, *names = sys.argv[1:]
    for name in names or FAMILIES:
        run(name, Path(cache))


def run(name, cache):
    print(name, end=":", flush=True)
    op = "cross_entropy" if name == "short" else name
    family, results = FAMILIES[op], RESULTS[op]
    kernels, launched = build(family, cache=cache, guards=GUARDS), set()
    launch = kernels.run
    kernels.run = lambda name, *rest: launched.add(name) or launch(name, *rest)
    if name == "short":
        logits, targets = torch.zeros(3, 64), torch.zeros(3, dtype=torch.int64)
        tensors = dict(logits=logits, targets=targets, losses=torch.empty(2))
        with patch.object(family, "kernels", lambda device: kernels):
            cross_entropy.call(logits, tensors, vocabulary=64, scale=1.0, pull=0.0)
    results(kernels)
    print(*sorted({*family.names} - launched), flush=True)


if __name__ == "__main__":
    main()
