"""No code of the current folder runs: not in processes that commands start, nor by the imports of other packages."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rwkv_peft.children import elsewhere, python_command
from rwkv_peft.ops.native import build
from traps import set_traps

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "RWKV-PEFT" / "rwkv_peft"


@pytest.fixture
def ran(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return set_traps(tmp_path)


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rows_and_pictures_are_not_the_current_folders(ran, tmp_path):
    (tmp_path / "rows.txt").write_text("a line\n")
    flags = ("--tokenizer", "bytes", "--output", "data")
    assert "data: 1 document" in run(python_command("rwkv_peft", "preprocess", "rows.txt", *flags))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.5}\n')
    run(python_command("rwkv_peft", "plot", "metrics.jsonl", "loss.png"))
    assert (tmp_path / "loss.png").is_file() and not ran.exists()


def test_the_first_compile_is_not_the_current_folders(ran, tmp_path):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    assert build.build_library("answer", source, ("-fPIC",), cache=tmp_path / "cache").is_file()
    assert not ran.exists()


def test_a_folder_that_is_gone_is_come_back_to(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with elsewhere():
        assert Path.cwd() == PACKAGE
    with pytest.raises(FileNotFoundError):
        Path.cwd()


SHELLS = re.compile(r"\bos\.(exec|spawn|system|popen)|shell=True|getoutput")


def test_commands_start_a_python_by_children_py():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not SHELLS.search(text), f"{path}: start a program with subprocess, and no shell"
        for line in re.findall(r"^.*sys\.executable.*", text, re.MULTILINE):
            shown = "{sys.executable}" in line
            assert shown or path == PACKAGE / "children.py", f"{path}: name a module to children.python_command"
        if "get_context" in text:
            assert "elsewhere()" in text, f"{path}: let processes begin in children.elsewhere"
        for line in re.findall(r"^ +(?:from|import) matplotlib.*", text, re.MULTILINE):
            assert "import_matplotlib" in text, f"{path}: {line}"


@pytest.mark.parametrize("folder", ["benchmarks", "demo"])
def test_other_programs_name_a_python_file_or_run_in_the_repositorys_folder(folder):
    for path in (ROOT / folder).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "cwd=ROOT" in text or not re.search(r'sys\.executable,\s*"-[mc]"', text), f"{path}: see children.py"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/*.sh")), ids=lambda path: path.name)
def test_scripts_do_too(path):
    """They call Python with -I, or from the repository's folder."""
    before = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.search(r'"\$\w+"( -\w)* -[mc] ', line) and " -I " not in line:
            assert re.search(r'^cd "\$root"$', before, re.MULTILINE) or '(cd "$root" && ' in line, line
        before += line + "\n"
