"""The choice of an NVRTC, and the key under which its code is cached. The libraries are stand-ins."""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv_peft.ops.native import cuda

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


def test_without_any_there_is_none(installed):
    installed()
    assert not list(cuda.compilers())


def test_code_is_kept_by_the_compilers_version(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    newer, older = (cuda.Nvrtc(Library(version)) for version in ((13, 5), (12, 4)))
    source = "name", "cross_entropy/cross_entropy.cu"
    first = cuda.cubin(*source, "sm_90", newer)
    assert cuda.cubin(*source, "sm_90", older) != first
    assert cuda.cubin(*source, "sm_90", newer) == first
    assert (newer.library.compiled, older.library.compiled) == (1, 1)
    assert cuda.cubin(*source, "sm_90", newer, anew=True) == newer.library.image != first
    assert cuda.cubin(*source, "sm_90", newer) == newer.library.image
    assert newer.library.compiled == 2
