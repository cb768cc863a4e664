"""The CPU kernel as a wkv6 backend: builds cuda/wkv6_cpu*.cpp on first use and calls it through its C interface."""

import ctypes
import functools
import platform
import subprocess

import torch

from .build import BuildError, Unit, build_library, find_program, source_directory

# Instruction sets, fastest first, and what the compiler needs to use them. Each is a library of its own, so that the
# first use compiles only the one that this processor takes.
LEVELS = ("avx512bf16", "avx512", "avx2", "portable")
AVX2_FLAGS = ("-mavx2", "-mfma")
AVX512_FLAGS = (*AVX2_FLAGS, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mprefer-vector-width=512")
AVX512BF16_FLAGS = (*AVX512_FLAGS, "-mavx512bf16")  # conversions to bfloat16, products of its pairs
X86 = ("x86_64", "AMD64")
COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp")

TILE = 64  # steps between two saved states; wkv6_cpu.cpp's kTile


def unavailable(level=""):
    """None where the kernel works here (at `level`, or at any), else why it does not and what would help."""
    return _unavailable(level)


@functools.cache
def _unavailable(level):
    best = best_level()
    if level and LEVELS.index(level) < LEVELS.index(best):
        return f"this processor has no {level}; its best is cpu:{best}"
    try:
        _library(level or best)
    except BuildError as error:
        return str(error)
    return None


@functools.cache
def best_level():
    """The fastest of LEVELS that this processor has; of those for bfloat16 also that the compiler knows."""
    found = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")
    if found not in level_flags():
        return "portable"
    has_bfloat16 = found == "avx512" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "avx512bf16" if has_bfloat16 and compiler_knows(AVX512BF16_FLAGS) else found


def compiler_knows(flags):
    """Whether there is a compiler that takes these flags."""
    try:
        command = [find_compiler(), *flags, "-E", "-x", "c++", "/dev/null"]
    except BuildError:
        return False
    return subprocess.run(command, capture_output=True).returncode == 0


def checkpoint_count(tokens, sequences):
    """States kept for backward: one at each 64th step of a sequence, except its first (that one is the input)."""
    return tokens // TILE


def forward(r, k, v, w, u, state, cu_seqlens, save, level):
    """Contiguous r k v w (B, T, H, N), float32 or bfloat16; u (H, N), state (n, H, N, N) or None, float32;
    cu_seqlens (n + 1,) int64 or None -> y, final state, checkpoints (float32, empty unless `save`)."""
    B, T, H, N = r.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty_like(r)
    final_state = u.new_empty(sequences, H, N, N)
    checkpoints = u.new_empty(checkpoint_count(B * T, sequences) if save else 0, H, N, N)
    status = _library(level or best_level()).wkv6_cpu_forward(
        *(_pointer(x) for x in (r, k, v, w, u, state, y, final_state)),
        _pointer(checkpoints) if save else None,
        *_sizes(r, cu_seqlens, sequences),
    )
    _check(status)
    return y, final_state, checkpoints


def backward(r, k, v, w, u, state, cu_seqlens, checkpoints, gy, gfinal, level):
    """The gradients of r k v w u and state, given those of y and of the final state (None for zeros)."""
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    H, N = u.shape
    gr, gk, gv, gw = (torch.empty_like(x) for x in (r, k, v, w))
    gu = torch.empty_like(u)
    gstate = u.new_empty(sequences, H, N, N)
    status = _library(level or best_level()).wkv6_cpu_backward(
        *(_pointer(x) for x in (r, k, v, w, u, state, checkpoints, gy, gfinal, gr, gk, gv, gw, gu, gstate)),
        *_sizes(r, cu_seqlens, sequences),
    )
    _check(status)
    return gr, gk, gv, gw, gu, gstate


def _sizes(r, cu_seqlens, sequences):
    B, T, H, N = r.shape
    threads = torch.get_num_threads()
    is_bfloat16 = r.dtype == torch.bfloat16
    return sequences, B * T, H, N, _pointer(cu_seqlens), is_bfloat16, threads


def _pointer(x):
    return None if x is None else x.data_ptr()


def _check(status):
    if status != 0:
        raise MemoryError("wkv6: the CPU kernel found no memory for its work buffers; lower the batch or the threads")


@functools.cache
def _library(level):
    """A level's loaded library; BuildError where it cannot be built or loaded (not cached, so that a mended setup
    works)."""
    path = build_library(f"wkv6_cpu_{level}", *_recipe(source_directory(), level))
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}; delete that file so that it is built anew") from error
    pointer, integer, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    sizes = [integer, integer, integer, integer, pointer, flag, flag]
    library.wkv6_cpu_forward.argtypes = [pointer] * 9 + sizes
    library.wkv6_cpu_backward.argtypes = [pointer] * 15 + sizes
    return library


def find_compiler():
    """The path of a C++ compiler; BuildError where there is none."""
    remedy = "install one (Debian, Ubuntu: apt install g++), or take backend='reference'"
    return find_program("g++", "clang++", remedy=remedy)


def level_flags():
    """The instruction sets of this machine's architecture, best first -> the compiler's flags."""
    x86 = (
        {"avx512bf16": AVX512BF16_FLAGS, "avx512": AVX512_FLAGS, "avx2": AVX2_FLAGS}
        if platform.machine() in X86
        else {}
    )
    return {**x86, "portable": ()}


def _recipe(sources, level):
    """(units, link command, headers) of a level's library."""
    command = (find_compiler(), *COMMON_FLAGS, *level_flags()[level], f"-DWKV6_LEVEL={level}")
    units = [Unit(sources / name, command) for name in ("wkv6_cpu.cpp", "wkv6_cpu_interface.cpp")]
    return units, (command[0], "-shared", "-fopenmp"), headers(sources)


def headers(sources):
    """Every header that the kernel's sources include."""
    return [*sorted(sources.glob("wkv6_cpu*.h")), sources / "bfloat16.h"]
