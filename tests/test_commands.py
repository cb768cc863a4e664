"""Commands as a user types them: in a Python without torch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_peft.cli.commands import main, missing
from rwkv_peft.cli.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
MODULE = ("-m", "rwkv_peft")
GENERATE = (*MODULE, "generate", "--model", "absent.pth", "--prompt", "x")
MERGE = ("merge_bone.py", "--base_model", "b.pth", "--bone_checkpoint", "a.safetensors", "--output", "m.pth")
TRAIN = ("train.py", "--data_file", "data", "--load_model", "b.pth")
COMMAND_LINES = {"train.py": TRAIN, "merge_bone.py": MERGE, "generate": GENERATE}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python with nothing installed."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT / "RWKV-PEFT"), **more}


def run(python, *arguments):
    return subprocess.run([python, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True)


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_without_torch_one_line_names_the_python_and_the_remedy(bare, name):
    done = run(bare, *COMMAND_LINES[name])
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"this Python, {bare}, has no package " in done.stderr
    assert f"install it (sh {ROOT}/scripts/setup.sh)" in done.stderr


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_help_needs_no_torch(bare, name):
    done = run(bare, *COMMAND_LINES[name], "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage:")


def test_the_doctor_needs_no_environment_to_say_what_is_missing(bare):
    venv = {"VIRTUAL_ENV": str(bare.parents[1]), "PATH": os.defpath}
    script = ["sh", ROOT / "scripts" / "doctor.sh"]
    done = subprocess.run(script, cwd=bare.parent, env=venv, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "" and done.stdout.count("\n") == 1
    assert done.stdout.startswith(f"no environment: this Python, {bare}, has no torch; ")
    assert "scripts/setup.sh" in done.stdout or "activate" in done.stdout
    refused = run(bare, *MODULE, "doctor", "--fix")
    assert refused.returncode == 2 and "there is no --fix" in refused.stderr


def test_the_demo_for_hugging_face_models_names_its_own_requirements(bare):
    done = run(bare, "demo/bone_finetuning.py", "--help")
    assert done.returncode == 2 and f"(sh {ROOT}/scripts/setup.sh hf)" in done.stderr


def test_an_environment_beside_the_files_is_named():
    activate = ROOT / ".venv" / "bin" / "activate"
    told = str(missing(ModuleNotFoundError(name="torch")))
    assert (f". {activate}" in told) == (activate.is_file() and Path(sys.prefix) != ROOT / ".venv")


def test_a_module_of_our_own_that_is_missing_is_a_bug():
    bug = ModuleNotFoundError(name="rwkv_peft.absent")
    assert missing(bug) is bug


def test_threads_that_wait_do_not_spin_unless_the_user_says_so():
    code = "import os, rwkv_peft; print(os.environ['GOMP_SPINCOUNT'])"
    without = {key: value for key, value in environment().items() if key != "GOMP_SPINCOUNT"}
    for settings, expected in ((without, "2000"), (environment(GOMP_SPINCOUNT="7"), "7")):
        done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
        assert done.stdout.strip() == expected


def test_a_warning_of_bitsandbytes_about_a_download_is_kept_from_users():
    pytest.importorskip("bitsandbytes")
    done = run(sys.executable, "-c", "import rwkv_peft, bitsandbytes")
    assert done.returncode == 0 and "kernels-community" not in done.stderr


def test_switches_are_shown_as_they_are_written():
    done = run(sys.executable, "train.py", "--help")
    shown = re.sub("True.False|only True or False", "", done.stdout)  # what RWKV-LM's scripts write behind theirs
    assert "(default: 1)" in shown and "True" not in shown


@pytest.mark.parametrize("argv", [["-rows.jsonl", "--output", "data"], ["rows.jsonl", "--output", "-data"]])
def test_a_name_that_begins_with_a_dash_is_told_from_a_flag(argv):
    with pytest.raises(UserError, match="there is no -.*; a name that begins with a dash is given as ./-"):
        main(["preprocess", *argv])


@pytest.mark.parametrize(
    "argv",
    [["train", "--data_file", "data", "--merge_on_save", "1"], ["merge", "--base_model", "b.pth", "--dry_run", "0"]],
)
def test_a_value_behind_a_flag_that_takes_none_is_told(argv):
    with pytest.raises(UserError, match=f"{argv[-2]} takes no value, and {argv[-1]} follows it; leave"):
        main([*argv, "--bone_checkpoint", "a.pth"] if argv[0] == "merge" else argv)


@pytest.mark.parametrize(
    "words, message",
    [
        ("check --model b --adapter a --merged m --tokens 99999", "is above 16,384"),
        ("check --runtimes --merged m --tokens 99999", "--tokens: 99999 is above 16,384"),
        ("check --runtimes --merged m --tokens 0", "--tokens: 0 is below 1"),
        ("plot run --output=--", "--output=--: -- is no value; a name that is just that is given as ./--"),
    ],
)
def test_numbers_and_names_that_nothing_can_be_done_with_are_told(words, message):
    with pytest.raises(UserError) as error:
        main(words.split())
    assert message in str(error.value) and len(str(error.value)) < 400
