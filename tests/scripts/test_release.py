"""The released package: an sdist and a wheel that hold everything, and the main job run from the wheel alone."""

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
PLACE = "from importlib.util import find_spec; print(find_spec('rwkv_peft').origin)"  # without importing torch
REMEDY = "from rwkv_peft.cli.installing import how_to_install; print(how_to_install('serve'))"
SCREEN = 50  # lines at most that the notes of a release have
KERNELS = sorted(path.relative_to(ROOT) for kind in ("cpu", "cuda") for path in (ROOT / kind).rglob("*.*"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist, and the wheel built from it; built from a copy, so that the repository stays clean."""
    copy, output = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("dist")
    for path in (*BUILT_FROM, *(path.name for path in ROOT.glob("requirements*.txt"))):
        shutil.copy(ROOT / path, copy)
    for folder in ("RWKV-PEFT", "cpu", "cuda", "demo"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, cwd=copy)
    return output


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The bin folder of an environment with the wheel, which borrows its requirements from the tests' environment."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    wheel = next(built.glob("*.whl"))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    (packages / "requirements.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python.parent


def run(*command, cwd=None):
    """A command's output; it must succeed, without PYTHONPATH."""
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_kernel_and_the_word_that_it_is_typed(built):
    held = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    assert len(KERNELS) > 40
    assert [path for path in KERNELS if f"rwkv_peft/{path}" not in held] == []
    assert "rwkv_peft/py.typed" in held


def test_the_sdist_holds_what_builds_it_and_no_tests(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert {*BUILT_FROM, "requirements.txt"} <= held
    assert not [name for name in held if name.startswith("tests")]


def test_the_remedy_for_an_extra_is_a_command_that_an_index_can_answer(installed):
    """No package index has the name rwkv-peft."""
    remedy = run(installed / "python", "-c", REMEDY)
    assert "rwkv-peft" not in remedy and remedy.startswith("pip install 'fastapi") and "llguidance" in remedy


def test_one_version_is_told_everywhere(built, installed):
    version = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert sorted(path.name for path in built.iterdir()) == [
        f"rwkv_peft-{version}-py3-none-any.whl",
        f"rwkv_peft-{version}.tar.gz",
    ]
    assert run(installed / "rwkv-peft", "--version") == f"rwkv-peft {version}\n"
    (page,) = (ROOT / "docs").glob(f"releases/{version}.md")
    assert len(page.read_text(encoding="utf-8").splitlines()) <= SCREEN


def test_the_main_job_runs_from_the_wheel(installed, tmp_path):
    """Preprocess, train, merge and check the demo that the wheel holds, in an empty folder."""
    command = installed / "rwkv-peft"
    run(command, "demo", ".", cwd=tmp_path)
    (tmp_path / "rwkv7-demo.pth").rename(tmp_path / "base.pth")
    (tmp_path / "demo-chats.jsonl").rename(tmp_path / "rows.jsonl")
    where = run(installed / "python", "-c", PLACE, cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)

    run(command, "preprocess", "rows.jsonl", "--tokenizer", "bytes", "--output", "rows", cwd=tmp_path)
    flags = "--peft bone --bone_mode bat-in --bone_r 32 --dataload pad --ctx_len 192 --micro_bsz 8 --precision fp32"
    short = "--epoch_steps 5 --epoch_count 1 --answer_rows 0 --lr_init 5e-3 --accelerator cpu"
    paths = "--load_model base.pth --data_file rows --proj_dir out"
    run(command, "train", *paths.split(), *flags.split(), *short.split(), cwd=tmp_path)
    merged = "--base_model base.pth --bone_checkpoint out/adapter.safetensors".split()
    run(command, "merge", *merged, "--output", "merged.pth", cwd=tmp_path)
    told = run(command, "check", *merged, "--merged", "merged.pth", cwd=tmp_path)
    assert "same top token in 100%" in told
