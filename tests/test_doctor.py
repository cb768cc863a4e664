"""The doctor names missing parts, gives the command that mends each, and exits with 0 only if training can run."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging import markers
from packaging.requirements import Requirement

from rwkv_peft.tools.doctor import command, devices, packages
from rwkv_peft.tools.doctor.packages import MISSING, NOTE, OK, Finding, check_package

ROOT = Path(__file__).resolve().parents[1]


def test_every_requirement_is_bounded_and_met():
    found = packages.requirements()
    assert "torch" in [requirement.name for requirement in found]
    for requirement in found:
        assert requirement.specifier, f"{requirement.name} has no lower bound"
        assert check_package(requirement).status == OK


def test_what_is_for_other_pythons_is_no_requirement(monkeypatch):
    own = markers.default_environment()
    for version in ("3.13", "3.14"):
        monkeypatch.setattr(markers, "default_environment", lambda version=version: own | {"python_version": version})
        names = [requirement.name for requirement in packages.requirements()]
        assert ("pyrwkv-tokenizer" in names) == (version == "3.13")


def test_an_absent_package_is_missing_and_an_old_one_told_apart():
    for text, told in (("no-such-package-at-all", ""), ("numpy>=999", ">=999 is needed")):
        finding = check_package(Requirement(text))
        assert finding.status == MISSING and told in finding.text
        assert finding.remedy == "pip install -r requirements.txt" or told and finding.remedy


def test_a_package_that_does_not_import_is_reported_in_its_own_words(monkeypatch, tmp_path):
    (tmp_path / "brokenpackage.py").write_text("raise OSError('libsomething.so: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packages.metadata, "version", lambda name: "1.0")
    finding = check_package(Requirement("brokenpackage"))
    assert finding.status == MISSING and "libsomething.so" in finding.text


def test_a_python_outside_the_range_is_missing(monkeypatch):
    assert packages.check_python()[0].status == OK
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert packages.check_python()[0].status == MISSING


@pytest.mark.parametrize("status, code", [(OK, 0), (NOTE, 0), (MISSING, 1)])
def test_exit_code_says_whether_training_can_run(monkeypatch, capsys, status, code):
    monkeypatch.setattr(command, "examine", lambda: iter([Finding("torch", status, "text", "the remedy")]))
    assert command.main([]) == code
    printed = capsys.readouterr().out
    assert "the remedy" in printed and ("cannot run" in printed) == bool(code)


def test_a_missing_package_does_not_end_the_report(monkeypatch):
    monkeypatch.setattr(command, "requirements", lambda: [Requirement("torch-that-is-absent")])
    names = [finding.name for finding in command.examine()]
    assert {"python", "torch-that-is-absent", "compiler", "memory", "disk"} <= set(names)


def test_without_an_environment_one_line_tells_the_command_that_makes_it(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from rwkv_peft.cli.commands import run; run('doctor')"
    bare = [sys.executable, "-I", "-S", "-c", code]  # without what is installed
    for root in (ROOT, tmp_path):
        if root == tmp_path:
            shutil.copytree(
                ROOT / "RWKV-PEFT", root / "RWKV-PEFT", ignore=shutil.ignore_patterns("__pycache__", "cuda")
            )
            (root / "scripts").mkdir()
            shutil.copy(ROOT / "scripts/setup.sh", root / "scripts")
        done = subprocess.run([*bare, str(root / "RWKV-PEFT")], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr == "" and done.stdout.count("\n") == 1
        assert done.stdout.startswith(f"no environment: this Python, {sys.executable}, has no torch; ")
    assert f"install it (sh {tmp_path}/scripts/setup.sh)" in done.stdout


def test_the_free_disk_is_that_of_plan(monkeypatch):
    monkeypatch.setattr(devices, "room_at", lambda path: 7 * 2**30)
    assert any(finding.text.startswith("7 GiB free in ") for finding in devices.check_memory())


def test_this_machine_can_train(capsys):
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"{kernel} reference" in printed for kernel in ("wkv6", "wkv7")) and "GFLOP/s" in printed


def test_a_gpu_on_which_nothing_computes_is_told_in_words(monkeypatch):
    def refuse(dtype, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nlines of advice")

    card = SimpleNamespace(name="a card", major=5, minor=2, total_memory=2**32)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.init", lambda: None)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: card)
    monkeypatch.setattr(devices, "matmul_speed", refuse)
    finding = list(devices.check_devices())[-1]
    assert finding.status == MISSING and finding.text.endswith("for execution on the device")
    assert "--accelerator cpu" in finding.remedy
    monkeypatch.setattr(command, "check_kernels", lambda: pytest.fail("they would be tried on it"))
    assert finding in command.examine()
    assert "memory" in [finding.name for finding in command.examine()]
