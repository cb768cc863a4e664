"""A built wheel holds every source of the kernels, so that an installed package can compile them."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def test_a_wheel_holds_every_source(tmp_path):
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools 77")
    copy = tmp_path / "repository"
    copy.mkdir()
    for path in ("pyproject.toml", "README.md", "LICENSE", *(path.name for path in ROOT.glob("requirements*.txt"))):
        shutil.copy(ROOT / path, copy)
    for folder in ("RWKV-PEFT", "cpu", "cuda"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    sources = [path.relative_to(ROOT) for kind in ("cpu", "cuda") for path in (ROOT / kind).rglob("*.*")]
    assert len(sources) > 40
    assert [str(path) for path in sources if f"rwkv_peft/{path}" not in held] == []
