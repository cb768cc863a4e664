"""The instruction sets that CPU kernels are compiled for, and which of them this processor has.

Each has a library of its own, so that the first use compiles only one of them.
"""

import functools
import platform

import torch

from .build import compiler_knows

LEVELS = ("avx512bf16", "avx512", "avx2", "portable")  # fastest first
AVX2_FLAGS = ("-mavx2", "-mfma")
AVX512_FLAGS = (*AVX2_FLAGS, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mprefer-vector-width=512")
AVX512BF16_FLAGS = (*AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni")  # products of pairs; bfloat16 came after VNNI
X86 = ("x86_64", "AMD64")


@functools.cache
def best_level() -> str:
    """The fastest of LEVELS that this processor has; avx512bf16 only if the compiler knows it."""
    found = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")
    if found not in level_flags():
        return "portable"
    has_bfloat16 = found == "avx512" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "avx512bf16" if has_bfloat16 and compiler_knows(AVX512BF16_FLAGS) else found


def is_here(level: str) -> bool:
    """True if this processor has the given one of LEVELS."""
    return LEVELS.index(level) >= LEVELS.index(best_level())


def level_flags() -> dict[str, tuple[str, ...]]:
    """The instruction sets of this machine's architecture, best first -> the compiler's flags."""
    x86 = (
        {"avx512bf16": AVX512BF16_FLAGS, "avx512": AVX512_FLAGS, "avx2": AVX2_FLAGS}
        if platform.machine() in X86
        else {}
    )
    return {**x86, "portable": ()}
