"""The kernels' headers: each compiles by itself, and Python's structures have the layout of C++'s."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from rwkv_peft.ops.bone import cpu as bone
from rwkv_peft.ops.bone import cuda as bone_cuda
from rwkv_peft.ops.cross_entropy import cpu as cross_entropy
from rwkv_peft.ops.cross_entropy import cuda as cross_entropy_cuda
from rwkv_peft.ops.decode import cpu as decode
from rwkv_peft.ops.decode import cuda as decode_cuda
from rwkv_peft.ops.mix import cpu as mix
from rwkv_peft.ops.mix import cuda as mix_cuda
from rwkv_peft.ops.native.build import BuildError, compiler_knows, find_compiler, included_files, source_directory
from rwkv_peft.ops.native.cpu import LEVELS, best_level, level_flags
from rwkv_peft.ops.wkv6 import cpu as wkv6_cpu
from rwkv_peft.ops.wkv6 import cuda as wkv6_cuda
from rwkv_peft.ops.wkv7 import cpu as wkv7_cpu
from rwkv_peft.ops.wkv7 import cuda as wkv7_cuda

CPU, CUDA = source_directory("cpu"), source_directory("cuda")
SHIM = Path(__file__).resolve().parents[2] / "cuda_shim"
NEEDS = {"bone/pairs.h": "avx512bf16", "bone/amx.h": "amx"}  # headers for some instruction sets alone
FOR_GPUS = "common/ptx.cuh"  # which the shim replaces
STRUCTURES = (
    (wkv6_cpu.RECURRENCE.Arguments, CPU, "wkv6/arguments.h"),
    (wkv6_cuda.RECURRENCE.Arguments, CUDA, "wkv6/arguments.cuh"),
    (wkv7_cpu.RECURRENCE.Arguments, CPU, "wkv7/arguments.h"),
    (mix_cuda.MixArguments, CUDA, "mix/arguments.cuh"),
    (bone_cuda.BoneArguments, CUDA, "bone/arguments.cuh"),
    (wkv7_cuda.RECURRENCE.Arguments, CUDA, "wkv7/arguments.cuh"),
    (cross_entropy_cuda.CrossEntropyArguments, CUDA, "cross_entropy/arguments.cuh"),
    (decode_cuda.DecodeArguments, CUDA, "decode/arguments.cuh"),
    (cross_entropy.CrossEntropyArguments, CPU, "cross_entropy/arguments.h"),
    *((getattr(decode, name), CPU, "decode/arguments.h") for name in dir(decode) if name.endswith("Arguments")),
    *((structure, CPU, "mix/arguments.h") for structure in mix.STRUCTURES.values()),
    *((getattr(bone, name), CPU, "bone/arguments.h") for name in dir(bone) if name.endswith("Arguments")),
)


def names(root, pattern):
    return [str(path.relative_to(root)) for path in sorted(root.rglob(pattern))]


@pytest.fixture(scope="module")
def compiler():
    try:
        return find_compiler()
    except BuildError as error:
        pytest.skip(str(error))


def compile_text(command, text, suffix, folder):
    source = folder / f"source{suffix}"
    source.write_text(text)
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def on_cpu(compiler, *flags):
    return [compiler, "-std=c++17", "-fopenmp", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{CPU}", *flags]


@pytest.fixture(scope="module")
def on_shim(compiler, tmp_path_factory):
    """The start of a command that compiles for the shim. Its header takes most of the time, and is compiled first."""
    header = tmp_path_factory.mktemp("shim") / "first.h"
    header.write_text("#include <cuda_shim.h>\n")
    # kernels wait for their launch, and #pragma unroll is NVRTC's
    command = [compiler, "-std=c++17", "-Wno-unknown-pragmas", "-Wno-unused-function", f"-I{SHIM}", f"-I{CUDA}"]
    subprocess.run([*command, "-x", "c++-header", str(header)], check=True)
    return [*command, "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-include", str(header)]


def on_level(compiler, level):
    flags = bone.level_flags().get(level)
    if flags is None or not compiler_knows(flags):
        pytest.skip(f"this compiler does not know {level}")
    return on_cpu(compiler, *flags, "-Wno-unused-function")


@pytest.mark.parametrize("header", names(CPU, "*.h"))
def test_a_header_of_the_cpus_compiles_alone(compiler, header, tmp_path):
    """At the level that includes the fewest headers; the sources test the others."""
    compile_text(on_level(compiler, NEEDS.get(header, "portable")), f'#include "{header}"\n', ".cpp", tmp_path)


@pytest.mark.parametrize("level", ("amx", "avx512", "portable"))
@pytest.mark.parametrize("source", names(CPU, "*.cpp"))
def test_a_source_of_the_cpus_compiles_without_warnings(compiler, source, level, tmp_path):
    """At the best level and the least, between which this machine's own levels are compiled to be run."""
    if level == "avx512" and LEVELS.index(best_level()) < LEVELS.index(level):
        pytest.skip("this processor runs them")
    compile_text(on_level(compiler, level), f'#include "{source}"\n', ".cpp", tmp_path)


@pytest.mark.parametrize("header", sorted({*names(CUDA, "*.cuh")} - {FOR_GPUS}))
def test_a_header_of_the_gpus_compiles_alone(on_shim, header, tmp_path):
    """Each includes device.cuh, if only by way of others, whose header of the shim is compiled before."""
    path, device = CUDA / header, CUDA / "common" / "device.cuh"
    assert device in (path, *included_files(path, CUDA))
    compile_text(on_shim, f'#include "{header}"\n', ".cpp", tmp_path)


def facts(structure):
    """What C++ must find of a structure: its size, and where each field lies, how long and of which kind it is."""
    name = structure.__name__
    yield f"sizeof({name}) == {ctypes.sizeof(structure)}"
    for field, kind in structure._fields_:
        yield f"offsetof({name}, {field}) == {getattr(structure, field).offset}"
        yield f"sizeof({name}::{field}) == {ctypes.sizeof(kind)}"
        kinds = {ctypes.c_void_p: "pointer", ctypes.c_float: "floating_point"}
        is_array = issubclass(kind, ctypes.Array)
        trait = kinds.get(kind._type_ if is_array else kind, "integral")
        yield f"std::is_{trait}<std::remove_extent_t<decltype({name}::{field})>>::value"


@pytest.mark.parametrize(
    "place", sorted({(root, header) for _, root, header in STRUCTURES}), ids=lambda place: place[1]
)
def test_python_and_cpp_agree_on_structures(compiler, on_shim, place, tmp_path):
    root, header = place
    text = f'#include <cstddef>\n#include <type_traits>\n#include "{header}"\n'
    found = [fact for structure, *where in STRUCTURES if tuple(where) == place for fact in facts(structure)]
    text += "".join(f'static_assert({fact}, "{fact}");\n' for fact in found)
    compile_text(on_cpu(compiler) if root == CPU else on_shim, text, ".cpp", tmp_path)


def test_what_is_included_is_found_by_way_of_others(tmp_path):
    (tmp_path / "family").mkdir()
    (tmp_path / "family" / "a.h").write_text('#pragma once\n#include <vector>\n#  include "b.h"\n')
    (tmp_path / "b.h").write_text('#include "family/a.h"\n')
    (tmp_path / "unused.h").write_text("")
    source = tmp_path / "source.cpp"
    source.write_text('// #include "none.h" stands in a comment\n#include "family/a.h"\n')
    assert included_files(source, tmp_path) == [tmp_path / "b.h", tmp_path / "family" / "a.h"]
    (tmp_path / "b.h").write_text('#include "none.h"\n')
    with pytest.raises(BuildError, match="none.h is missing.*reinstall"):
        included_files(source, tmp_path)


@pytest.mark.parametrize("root", [CPU, CUDA], ids=["cpu", "cuda"])
def test_every_header_serves_a_source(root):
    sources = [path for suffix in ("*.cpp", "*.cu") for path in root.rglob(suffix)]
    assert sources
    used = {path for source in sources for path in included_files(source, root)}
    assert used == {*root.rglob("*.h"), *root.rglob("*.cuh")}


def test_levels_grow():
    """Each level's flags hold those of the next."""
    sets = [set(flags) for flags in level_flags().values()]
    assert all(larger >= smaller for larger, smaller in zip(sets, sets[1:]))
