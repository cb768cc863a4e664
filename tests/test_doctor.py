"""The doctor names missing parts and the command that mends each, and commands that suit a file."""

import importlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import torch
import yaml
from packaging import markers
from packaging.requirements import Requirement

from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.base import base_of, save_model
from rwkv_peft.cli.commands import COMMANDS, main
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models import family_named
from rwkv_peft.ops import products
from rwkv_peft.ops.cuda_kernels import KERNELS
from rwkv_peft.tools import doctor
from rwkv_peft.tools.doctor import MISSING, NOTE, OK, Finding, check_package

ROOT = Path(__file__).resolve().parents[1]


def test_every_requirement_is_bounded_and_met_for_this_python(monkeypatch):
    found = doctor.requirements()
    assert "torch" in [requirement.name for requirement in found]
    for requirement in found:
        assert requirement.specifier, f"{requirement.name} has no lower bound"
        assert check_package(requirement).status == OK
    own = markers.default_environment()
    for version in ("3.13", "3.14"):
        monkeypatch.setattr(markers, "default_environment", lambda version=version: own | {"python_version": version})
        names = [requirement.name for requirement in doctor.requirements()]
        assert ("pyrwkv-tokenizer" in names) == (version == "3.13")


@pytest.mark.parametrize(
    "requirement, text, remedy",
    [
        ("no-such-package-at-all", "not installed", "pip install 'no-such-package-at-all'"),
        ("numpy>=999", ">=999 is needed", "pip install 'numpy>=999'"),
        ("brokenpackage", "libsomething.so", "pip install --force-reinstall 'brokenpackage'"),
    ],
)
def test_a_package_that_cannot_be_used_is_missing(monkeypatch, tmp_path, requirement, text, remedy):
    (tmp_path / "brokenpackage.py").write_text("raise OSError('libsomething.so: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    if requirement == "brokenpackage":
        monkeypatch.setattr(doctor.metadata, "version", lambda name: "1.0")
    finding = check_package(Requirement(requirement))
    assert finding.status == MISSING and text in finding.text and finding.remedy == remedy


@pytest.mark.parametrize("status, code", [(OK, 0), (NOTE, 0), (MISSING, 1)])
def test_exit_code_says_whether_training_can_run(monkeypatch, capsys, status, code):
    monkeypatch.setattr(doctor, "examine", lambda: iter([Finding("torch", status, "text", "the remedy")]))
    assert doctor.main([]) == code
    printed = capsys.readouterr().out
    assert "the remedy" in printed and ("cannot run" in printed) == bool(code)


def test_a_missing_package_does_not_end_the_report(monkeypatch):
    monkeypatch.setattr(doctor, "requirements", lambda: [Requirement("torch-that-is-absent")])
    monkeypatch.setattr(doctor, "room_at", lambda path: 7 * 2**30)
    found = {finding.name: finding.text for finding in doctor.examine()}
    assert {"python", "torch-that-is-absent", "compiler", "memory", "peft"} <= set(found)
    assert found["disk"].startswith("7 GiB free in ")


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


def test_this_machine_can_train(capsys):
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"{kernel} reference" in printed for kernel in ("wkv6", "wkv7")) and "GFLOP/s" in printed


@pytest.mark.parametrize("fast, status", ((products.CONVERTING, doctor.OK), (products.NATIVE, doctor.NOTE)))
def test_a_row_of_products_that_another_beats_is_told(monkeypatch, fast, status):
    def measured(dtype, device):
        return 100 + 300 * (products.row().bf16 == fast.bf16) * (dtype == torch.bfloat16)

    monkeypatch.setattr(doctor, "matmul_speed", measured)
    with products.computing(products.CONVERTING):
        found = doctor.check_products()
    assert (found.status, f"{fast} is faster" in found.text) == (status, status == doctor.NOTE)
    assert f"{products.CONVERTING}" in found.text and "400" in found.text


def test_a_gpu_on_which_nothing_computes_is_told_in_words(monkeypatch):
    def refuse(dtype, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nlines of advice")

    card = SimpleNamespace(name="a card", major=5, minor=2, total_memory=2**32)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.init", lambda: None)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: card)
    monkeypatch.setattr(doctor, "matmul_speed", refuse)
    monkeypatch.setattr(doctor, "check_kernels", lambda: pytest.fail("they would be tried on it"))
    (finding,) = (finding for finding in doctor.examine() if finding.status == MISSING)
    assert finding.text.endswith("for execution on the device") and "--accelerator cpu" in finding.remedy


BASE, CONVERT = "train on rows", "make it a base"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_state):
    """A folder with files of every kind, under a name that a shell would split."""
    folder = tmp_path_factory.mktemp("kinds") / "my files"
    folder.mkdir()
    state = tiny_state(dtype=torch.bfloat16, vocab_size=257)
    save_model(folder / "base.pth", state)
    metadata = AdapterMetadata("bone", rank=8, targets=("att.key",), base_fingerprint=base_of(state).fingerprint)
    save_adapter(folder / "bone.safetensors", {"blocks.1.att.key.bone": torch.ones(8, 64)}, metadata)
    save_model(folder / "state.pth", {f"blocks.{i}.att.time_state": torch.zeros(4, 16, 16) for i in range(2)})
    begun = {f"blocks.{i}.{half}.shift": torch.zeros(64) for i in range(2) for half in ("att", "ffn")}
    save_model(folder / "begun.pth", state | begun)
    for name in ("model.st", "model.gguf", "hf"):
        main(["convert", str(folder / "base.pth"), str(folder / name)])
    config = (family := family_named("x070a")).new_dimensions(1, 64, 257)
    save_model(folder / "7a.pth", {key: torch.zeros(shape) for key, shape in family.shapes(config).items()})
    torch.save(state | {"blocks.0.ffn.s_emb.weight": torch.zeros(2, 4)}, folder / "deep.pth")
    return folder


@pytest.mark.parametrize(
    "name, kind, purpose",
    [
        ("base.pth", "model, RWKV-6", BASE),
        ("model.st", "model, RWKV-6", CONVERT),
        ("hf", "model, RWKV-6", CONVERT),
        ("bone.safetensors", "adapter, written by rwkv_peft", "make one model"),
        ("7a.pth", "model, RWKV-7a (x070a)", BASE),
        ("begun.pth", "tuned, of 2 layers (with shifts", BASE),
        ("state.pth", "time states of 2 layers", "bring it to Ai00"),
    ],
)
def test_a_file_is_named_with_the_commands_that_suit_it(folder, capsys, name, kind, purpose):
    capsys.readouterr()
    assert main(["doctor", "--model", str(folder / name)]) == 0
    about, commands = capsys.readouterr().out.split("\n\n")
    assert about.startswith("kind") and kind in about
    assert ("convert" in commands) == (
        name not in ("7a.pth", "begun.pth", "bone.safetensors")
    )  # for which there is no such form
    assert ("--train_parts state --state_parts shift" in commands) == (name == "begun.pth")
    quoted = shlex.quote(str(folder / name))
    assert any(line.startswith(f"{purpose}  ") and quoted in line for line in commands.split("\n"))


def test_a_file_that_no_command_takes_is_told(folder, capsys):
    assert main(["doctor", "--model", str(folder / "deep.pth")]) == 1
    assert capsys.readouterr().out.endswith("\nno command of rwkv-peft takes it\n")
    with pytest.raises(UserError, match=r"absent.pth"):
        main(["doctor", "--model", "absent.pth"])


@pytest.mark.parametrize("kind", doctor.COMMANDS)
def test_every_command_that_is_named_takes_its_flags(kind):
    named = {command.name: command for command in COMMANDS}
    for _, line in doctor.COMMANDS[kind]:
        program, name, *argv = shlex.split(line.format("file"))
        assert program == "rwkv-peft"
        module, _, check = named[name].flags.partition(":")
        getattr(importlib.import_module(f"rwkv_peft.{module}"), check)(argv)


def test_a_report_follows_its_schema_and_names_neither_user_nor_machine_nor_key(monkeypatch, tmp_path, capsys):
    home = tmp_path / "home" / "somebody"
    (home / "work").mkdir(parents=True)
    (home / "log").write_text(
        "first line\n" * 50 + f"File {home}/base.pth of somebody on thisbox\nhttps://me:secret@host/ hf_abcdefgh1234\n"
    )
    monkeypatch.chdir(home / "work")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(doctor.getpass, "getuser", lambda: "somebody")
    monkeypatch.setattr(doctor.platform, "node", lambda: "thisbox")
    assert main(["doctor", "--report", str(home / "log")]) in (0, 1)
    printed = capsys.readouterr().out
    report = json.loads(printed)
    jsonschema.validate(report, json.loads((ROOT / "docs/reference/report.schema.json").read_text()))
    assert report["last_error"].splitlines()[-2:] == ["File ~/base.pth of USER on HOST", "https://KEY@host/ KEY"]
    assert len(report["last_error"].splitlines()) == doctor.LOG_LINES
    assert not [word for word in ("somebody", "thisbox", "secret", "hf_") if word in printed]
    assert {"python", "torch", "memory", "disk", "--precision"} <= {one["name"] for one in report["findings"]}
    template = (ROOT / ".github/ISSUE_TEMPLATE/problem.yml").read_text()
    assert "rwkv-peft doctor --report" in str(yaml.safe_load(template))


def test_a_report_of_a_machine_with_a_gpu_names_driver_card_memory_and_kernels(monkeypatch, tmp_path, capsys):
    """A T4, which runs no kernel, so that none is compiled."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    card = SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=15 * 2**30)
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "init": None,
        "current_device": 0,
        "get_device_capability": (7, 5),
        "get_device_name": card.name,
        "get_device_properties": card,
        "get_arch_list": ["sm_75"],
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value: value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "matmul_speed", lambda dtype, device: 100)
    assert main(["doctor", "--report"]) == 0
    report = json.loads(capsys.readouterr().out)
    jsonschema.validate(report, json.loads((ROOT / "docs/reference/report.schema.json").read_text()))
    texts = {one["name"]: one["text"] for one in report["findings"]}
    assert texts["driver"] == "580.65.06"
    assert texts["GPU 0"].startswith("Tesla T4, 15 GiB, compute capability 7.5, torch's CUDA 13.0")
    assert "logical cores" in texts["processor"] and "float32 by" in texts["products"]
    kernels = ("wkv6 cuda", "wkv7 cuda", *(name for name, _ in KERNELS))
    assert all("need 8.0 (Ampere) or newer" in texts[name] for name in kernels)


@pytest.mark.parametrize(
    "body, text", [("echo NVML: mismatch; exit 9", "nvidia-smi fails: NVML: mismatch"), (None, "")]
)
def test_a_driver_that_fails_is_reported_and_one_that_is_absent_is_not(monkeypatch, tmp_path, body, text):
    monkeypatch.setenv("PATH", str(tmp_path))
    if body:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert [(finding.status, finding.text) for finding in doctor.check_driver()] == ([(NOTE, text)] if body else [])
