"""Kernels' files: compiled once, found again, safe in parallel, clear when that fails; the choice of an NVRTC and of
its code for a card, with stand-ins for compilers and cards."""

import ctypes
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv_peft.ops.native import build as building
from rwkv_peft.ops.native import cuda
from rwkv_peft.ops.native.build import BuildError, build_library, cache_directory, load
from rwkv_peft.ops.native.cpu import CpuFamily

CODE = """
struct Pair { double x; int n; };
extern "C" int answer() { return 42; }
extern "C" double times(const Pair* pair) { return pair->x * pair->n; }
"""
OTHER = 'extern "C" int answer() { return 43; }'


class Pair(ctypes.Structure):
    _fields_ = [("x", ctypes.c_double), ("n", ctypes.c_int)]


@pytest.fixture
def make(tmp_path):
    """make(text, flags, headers) -> the library of a source, which is written if a text is given, in the folder
    `cache`."""
    source = tmp_path / "a source.cpp"  # a space, as users' folders have
    source.write_text(CODE)

    def run(text=None, flags=(), headers=()):
        if text is not None:
            source.write_text(text)
        return build_library("answer", source, ("-fPIC", *flags), headers, tmp_path / "cache")

    return run


def answer(path):
    return ctypes.CDLL(str(path)).answer()


def test_a_library_is_built_once_and_found_again_and_serves_where_no_compiler_is(make, monkeypatch, tmp_path):
    first = make()
    assert load(first, ("times", ctypes.c_double, Pair)).times(Pair(1.5, 3)) == 4.5
    written = first.stat().st_mtime_ns
    monkeypatch.setenv("PATH", str(tmp_path))
    assert make() == first and first.stat().st_mtime_ns == written
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) in ([".so"], [".lock", ".so"])
    with pytest.raises(BuildError, match="no g.. or clang..*apt install g.*dnf install gcc-c.*conda install .*gxx"):
        make(OTHER)


def test_a_user_without_a_home_is_told_so(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert "point XDG_CACHE_HOME at one" in CpuFamily("wkv6", ()).unavailable()


@pytest.mark.parametrize("mode, user", [(0o777, 0), (0o755, 1)])
def test_a_cache_of_others_is_not_trusted(tmp_path, monkeypatch, mode, user):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_directory()  # it is not there yet
    folder.mkdir()
    cache_directory()
    folder.chmod(mode)
    if os.getuid() == 0:  # whose folders all trust
        os.chown(folder, 4321, -1)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + user)
    with pytest.raises(BuildError, match="other users may put files into"):
        cache_directory()


def test_source_header_and_flags_decide_the_file(tmp_path, make):
    header = tmp_path / "header.h"
    header.write_text("1")
    paths = [make(), make(headers=(header,))]
    header.write_text("2")
    paths += [make(headers=(header,)), make(flags=('-DTEXT="a $b"',))]
    paths.append(make(OTHER))
    assert len(set(paths)) == 5
    assert [answer(path) for path in paths] == [42, 42, 42, 42, 43]


def test_another_checkouts_build_serves(tmp_path):
    """The sources' content decides, not their folder: a second clone compiles nothing."""
    made = []
    for clone in ("one", "two"):
        folder = tmp_path / clone
        folder.mkdir()
        header, source = folder / "answer.h", folder / "answer.cpp"
        header.write_text("#define ANSWER 42")
        source.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }')
        made.append(build_library("answer", source, ("-fPIC", f"-I{folder}"), (header,), tmp_path / "cache"))
    assert made[0] == made[1] and answer(made[0]) == 42


def test_processes_that_build_at_once_compile_once(tmp_path, make):
    """Several processes (without torch, which starts slowly) begin together; the compiler notes its runs."""
    log, slow = tmp_path / "log", tmp_path / "g++"
    slow.write_text(f'#!/bin/sh\necho run >> {log}; sleep 0.3\nexec {building.find_compiler()} "$@"\n')
    slow.chmod(0o755)
    program = (
        "import ctypes, sys; from pathlib import Path; from rwkv_peft.ops.native.build import build_library\n"
        "source, cache = sys.argv[1:]\n"
        "path = build_library('answer', Path(source), ('-fPIC',), cache=Path(cache))\n"
        "sys.exit(ctypes.CDLL(str(path)).answer() != 42)"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "a source.cpp"), str(tmp_path / "cache")]
    environment = os.environ | {"PYTHONPATH": str(Path(building.__file__).parents[3])}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    processes = [subprocess.Popen(arguments, env=environment) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert log.read_text().count("run") == 1


def test_a_dead_builders_lock_and_leftovers_do_not_hinder(make, tmp_path):
    (tmp_path / "cache" / "answer.build").mkdir(parents=True)
    (tmp_path / "cache" / "answer.lock").touch()
    (tmp_path / "cache" / "answer.build" / "library.so").touch()
    assert answer(make()) == 42
    assert not (tmp_path / "cache" / "answer.build").exists()


def test_a_failure_says_what_to_do_and_leaves_nothing(tmp_path, make):
    with pytest.raises(BuildError, match="undeclared"):
        make("int answer() { return undeclared; }")
    assert not list((tmp_path / "cache").glob("*.so"))
    (tmp_path / "a.so").write_text("not a library")
    with pytest.raises(BuildError, match="cannot load .*a.so.*; delete that file so that it is built anew"):
        load(tmp_path / "a.so")
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match="make that folder writable"):
        build_library("answer", tmp_path / "a source.cpp", (), cache=tmp_path / "file")


VERSIONS = {"libnvrtc.so.12": (12, 4), "libnvrtc.so.13": (13, 5)}


class Library:
    """An NVRTC of a version, whose code is a description of the source, and which counts its compilations."""

    def __init__(self, version):
        self.version, self.compiled = version, 0

    def nvrtcVersion(self, major, minor):
        major._obj.value, minor._obj.value = self.version

    def nvrtcGetNumSupportedArchs(self, count):
        count._obj.value = 2

    def nvrtcGetSupportedArchs(self, numbers):
        numbers[:] = [90, 100]

    def nvrtcCompileProgram(self, *_):
        self.compiled += 1
        return 0

    def nvrtcGetCUBINSize(self, program, size):
        size._obj.value = len(self.image)

    def nvrtcGetCUBIN(self, program, text):
        ctypes.memmove(text, self.image, len(self.image))

    @property
    def image(self):
        return f"code of NVRTC {self.version}, compiled {self.compiled} times".encode()

    def __getattr__(self, name):
        return lambda *_: 0


@pytest.fixture
def installed(monkeypatch):
    """installed(*paths) makes these libraries those of the wheels; the system has none."""

    def load(path):
        if "/" not in path:
            raise OSError(f"{path}: cannot open shared object file")
        return Library(VERSIONS[Path(path).name])

    def install(*paths):
        monkeypatch.setattr(cuda, "installed_libraries", lambda: list(map(Path, paths)))
        monkeypatch.setattr(cuda.ctypes, "CDLL", load)

    return install


WHEELS = ("nvidia/cu13/lib/libnvrtc.so.13", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12")


@pytest.mark.parametrize(
    "of_torch, expected", [("12.4", ["12.4", "13.5"]), ("13.0", ["13.5", "12.4"]), (None, ["13.5", "12.4"])]
)
def test_that_of_torchs_cuda_comes_first(installed, monkeypatch, of_torch, expected):
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    installed(*WHEELS, WHEELS[0])  # one of them twice
    found = list(cuda.compilers())
    assert [compiler.version for compiler in found] == expected
    assert all(compiler.architectures == ["90", "100"] for compiler in found)


LAYOUTS = {  # of PyPI's wheels, of torch's wheels that bundle CUDA, of conda
    "site/nvidia/cu13/lib": ("libnvrtc.so.13", "libnvrtc-builtins.so.13.5"),
    "site/torch/lib": ("libnvrtc-1a2b3c.so.12", "libnvrtc-builtins.so.12.4", "libtorch.so"),
    "prefix/lib": ("libnvrtc.so.12", "libnvrtc-builtins.so.12.4"),
    "prefix/targets/x86_64-linux/lib": ("libnvrtc.so.12.4.127",),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_library_is_found_where_packages_put_it(layout, tmp_path, monkeypatch):
    folder, (library, *others) = tmp_path / layout, LAYOUTS[layout]
    folder.mkdir(parents=True)
    (tmp_path / "site" / "nvidia").mkdir(parents=True, exist_ok=True)
    for name in (library, *others):
        (folder / name).touch()
    loaded = []

    def load(path):
        loaded.append(path)
        if "/" not in path:
            raise OSError(f"{path}: cannot open shared object file")
        return Library((13, 5) if ".so.13" in path else (12, 4))

    monkeypatch.setattr(cuda.ctypes, "CDLL", load)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "site" / "torch" / "__init__.py"))
    monkeypatch.setattr(cuda.sys, "prefix", str(tmp_path / "prefix"))
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "site" / "nvidia")])
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: spec)
    (found,) = cuda.compilers()
    assert found.version == ("13.5" if library.endswith("13") else "12.4")
    before = [str(folder / name) for name in others if "builtins" in name]  # NVRTC asks for it by its bare name
    assert loaded[: len(before) + 1] == [*before, str(folder / library)]


def test_code_is_kept_by_the_compilers_version(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    newer, older = (cuda.Nvrtc(Library(version)) for version in ((13, 5), (12, 4)))
    source = "name", "cross_entropy/cross_entropy.cu"
    first = cuda.cubin(*source, "sm_90", newer)
    assert cuda.cubin(*source, "sm_90", older) != first
    assert cuda.cubin(*source, "sm_90", newer) == first
    assert (newer.library.compiled, older.library.compiled) == (1, 1)


CUDA_12_8 = ("80", "86", "87", "89", "90", "100", "101", "120")


def compiler(version, architectures=CUDA_12_8):
    made = cuda.Nvrtc.__new__(cuda.Nvrtc)
    made.version, made.architectures = version, architectures
    return made


class Arguments(ctypes.Structure):
    _fields_ = [("sizes", ctypes.c_int)]


@pytest.fixture
def build(monkeypatch):
    """build(nvrtcs, stale) -> the code whose kernels are taken. nvrtcs: the versions of NVRTC; code of `stale` ones
    does not load."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def run(nvrtcs=("13.0",), stale=()):
        def cubin(name, source, architecture, compiler):
            assert (name, source, architecture) == ("op_cuda", "op/op.cu", "sm_90")
            return compiler.version

        def load(names, image):
            if image in stale:
                raise BuildError(f"cuModuleLoadData failed with CUDA error 222 of {image}")
            return image

        monkeypatch.setattr(cuda, "compilers", lambda: map(compiler, nvrtcs))
        monkeypatch.setattr(cuda, "cubin", cubin)
        monkeypatch.setattr(cuda, "Kernels", load)
        return cuda.CudaFamily("op", (), Arguments).kernels(0)

    return run


def test_code_that_does_not_load_gives_way_to_the_next_compilers(build):
    assert build() == "13.0"
    assert build(nvrtcs=("12.8", "13.0"), stale=["12.8"]) == "13.0"
    with pytest.raises(BuildError, match="NVRTC 12.8: .* error 222 of 12.8\nNVRTC 13.0: .* of 13.0"):
        build(nvrtcs=("12.8", "13.0"), stale=["12.8", "13.0"])
    with pytest.raises(BuildError, match="no NVRTC.*; pip install nvidia-cuda-nvrtc"):
        build(nvrtcs=())


def test_a_failed_launch_is_an_error(monkeypatch):
    family, failing = cuda.CudaFamily("op", (), Arguments), SimpleNamespace(run=lambda *_: 700)
    monkeypatch.setattr(family, "kernels", lambda device: failing)
    with pytest.raises(RuntimeError, match="op: launching the CUDA kernel op_kernel failed with CUDA error 700"):
        family.run("op_kernel", torch.zeros(1), {}, 1)


@pytest.mark.parametrize(
    "capability, known, expected",
    [
        ((9, 0), CUDA_12_8, "90"),
        ((10, 3), CUDA_12_8, "100"),  # 101 is a Jetson's
        ((12, 1), CUDA_12_8, "120"),
        ((8, 9), ("80", "86", "87"), "86"),  # so is 87
        ((8, 7), ("80", "86", "87"), "87"),
        ((12, 0), ("120", "121"), "120"),
        ((12, 0), ("90", "100", "121"), None),
        ((8, 7), ("80", "86"), None),
        ((13, 0), (), None),
    ],
)
def test_a_card_runs_the_latest_code_before_its_own_of_its_major_version(capability, known, expected):
    made = compiler("12.8", known)
    if expected is not None:
        assert made.architecture_for(capability) == expected
        return
    words = "it does not compile for compute capability {}.{}; install a newer CUDA".format(*capability)
    with pytest.raises(BuildError, match=words):
        made.architecture_for(capability)


def test_each_card_is_judged_by_itself(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["an H100", "a T4"][index])
    assert cuda.misfit(0) is None
    assert "a T4 has compute capability 7.5" in cuda.misfit(1) == cuda.misfit()


def test_a_gpu_without_memory_for_a_kernel_is_told_and_turns_no_kernel_off(monkeypatch):
    """cuModuleLoadData's error 2 is no failed build, after which plain torch would compute."""

    class Driver:
        def __getattr__(self, function):
            return lambda *arguments: 2 if function == "cuModuleLoadData" else 0

    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver())
    with pytest.raises(torch.OutOfMemoryError, match="cuModuleLoadData"):
        cuda.Kernels(["forward"], b"")
