"""The kernels' sources compile without warnings, and Python's structures have the layout of C++'s."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from cuda_shim.shim import FAMILIES
from rwkv_peft.ops import cross_entropy, decode
from rwkv_peft.ops.bone import cpu as bone
from rwkv_peft.ops.mix import cpu as mix
from rwkv_peft.ops.native.build import BuildError, compiler_knows, find_compiler, included_files, source_directory
from rwkv_peft.ops.native.cpu import level_flags
from rwkv_peft.ops.wkv6 import WKV6
from rwkv_peft.ops.wkv7 import WKV7

CPU, CUDA = source_directory("cpu"), source_directory("cuda")
SHIM = Path(__file__).resolve().parents[1] / "cuda_shim"
NAMES = {"CpuArguments": "CrossEntropyArguments", "CudaArguments": "CrossEntropyArguments"}  # of other names in C++
ON_CPU = {
    "wkv6": [WKV6.cpu.Arguments],
    "wkv7": [WKV7.cpu.Arguments],
    "cross_entropy": [cross_entropy.CpuArguments],
    "decode": [decode.ProductArguments, decode.NormArguments, decode.ElementArguments],
    "mix": [*mix.STRUCTURES.values()],
    "bone": [kind for _, _, *kinds in bone.FUNCTIONS + bone.AMX_FUNCTIONS for kind in kinds],
}
STRUCTURES = {(CPU, f"{op}/arguments.h"): kinds for op, kinds in ON_CPU.items()}
STRUCTURES |= {(CUDA, f"{op}/arguments.cuh"): [family.structure] for op, family in FAMILIES.items()}


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


@pytest.mark.parametrize("level", ("amx", "portable"))
@pytest.mark.parametrize("source", names(CPU, "*.cpp"))
def test_a_source_of_the_cpus_compiles_without_warnings(compiler, source, level, tmp_path):
    """At the best level and the least; between these, this machine's own are compiled to be run."""
    compile_text(on_level(compiler, level), f'#include "{source}"\n', ".cpp", tmp_path)


def facts(structure):
    """What C++ must find of a structure: its size, and where each field lies, how long and of which kind it is."""
    name = NAMES.get(structure.__name__, structure.__name__)
    yield f"sizeof({name}) == {ctypes.sizeof(structure)}"
    for field, kind in structure._fields_:
        yield f"offsetof({name}, {field}) == {getattr(structure, field).offset}"
        yield f"sizeof({name}::{field}) == {ctypes.sizeof(kind)}"
        kinds = {ctypes.c_void_p: "pointer", ctypes.c_float: "floating_point"}
        is_array = issubclass(kind, ctypes.Array)
        trait = kinds.get(kind._type_ if is_array else kind, "integral")
        yield f"std::is_{trait}<std::remove_extent_t<decltype({name}::{field})>>::value"


@pytest.mark.parametrize("place", STRUCTURES, ids=lambda place: place[1])
def test_python_and_cpp_agree_on_structures(compiler, on_shim, place, tmp_path):
    root, header = place
    text = f'#include <cstddef>\n#include <type_traits>\n#include "{header}"\n'
    found = [fact for structure in STRUCTURES[place] for fact in facts(structure)]
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
