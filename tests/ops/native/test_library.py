"""Loading a library: its functions declared, and clear when it cannot be."""

import ctypes

import pytest

from rwkv_peft.ops.native.build import BuildError, build_library, load, source_directory
from rwkv_peft.ops.native.cpu import cpu_library

CODE = """
struct Pair { double x; int n; };
extern "C" double times(const Pair* pair) { return pair->x * pair->n; }
"""


class Pair(ctypes.Structure):
    _fields_ = [("x", ctypes.c_double), ("n", ctypes.c_int)]


def test_functions_are_declared(tmp_path):
    source = tmp_path / "times.cpp"
    source.write_text(CODE)
    path = build_library("times", source, ("-fPIC",), cache=tmp_path)
    assert load(path, ("times", ctypes.c_double, Pair)).times(Pair(1.5, 3)) == 4.5


def test_a_file_that_is_no_library_is_to_be_deleted(tmp_path):
    (tmp_path / "a.so").write_text("not a library")
    with pytest.raises(BuildError, match="cannot load .*a.so.*; delete that file so that it is built anew"):
        load(tmp_path / "a.so")


def test_a_full_cache_serves_where_no_compiler_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = ("cross_entropy", "cross_entropy/cross_entropy.cpp", ("-O0",), ())
    cpu_library(*wanted)
    monkeypatch.setenv("PATH", str(tmp_path))
    cpu_library(*wanted)
    (library,) = (tmp_path / "rwkv_peft").glob("*.so")
    cut = library.read_bytes()[:-1]
    library.unlink()  # because it is loaded: written over, it ends the process by a signal on leaving
    library.write_bytes(cut)
    with pytest.raises(BuildError, match="no g.. or clang.. on this machine's PATH; install one"):
        cpu_library(*wanted)


@pytest.mark.parametrize("kind, source", [("cpu", "wkv6/wkv6.cpp"), ("cuda", "wkv6/wkv6.cu")])
def test_the_sources_are_found(kind, source):
    assert (source_directory(kind) / source).is_file()
