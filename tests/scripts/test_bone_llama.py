"""scripts/bone_llama.sh: it runs without arguments on its own model and data, and refuses half of a user's input."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def script(variables, *flags, root=ROOT):
    environment = {key: value for key, value in os.environ.items() if key not in ("BASE_MODEL", "DATA_PATH")}
    command = ["sh", str(root / "scripts" / "bone_llama.sh"), *flags]
    return subprocess.run(command, env=environment | variables, text=True, capture_output=True)


def test_it_runs_on_what_it_makes_itself(tmp_path, warm_environment):
    done = script(warm_environment | {"OUTPUT_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}, "--max_steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "bone_ft" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "bone_merged" / "model.safetensors").is_file()


def test_help_is_the_scripts_own(tmp_path):
    done = script({"OUTPUT_DIR": str(tmp_path / "out")}, "--help")
    assert done.returncode == 0 and "sh scripts/bone_llama.sh [--flags]" in done.stdout
    assert "INIT_WEIGHTS" in done.stdout and "set -eu" not in done.stdout and not (tmp_path / "out").exists()


def test_half_of_a_users_input_is_refused(warm_environment):
    done = script(warm_environment | {"BASE_MODEL": "model"})
    assert done.returncode != 0 and "without DATA_PATH" in done.stderr


def test_a_users_model_is_not_trained_with_the_demos_settings(tmp_path, warm_environment):
    variables = warm_environment | {"OUTPUT_DIR": str(tmp_path / "out")}
    done = script(variables, "--base_model_name_or_path", "model", "--data_path=a.jsonl")
    assert done.returncode == 1 and "name yours by them" in done.stderr and not (tmp_path / "out").exists()


def test_a_users_flags_stand_for_the_scripts(tmp_path):
    """The last value of a flag counts."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "bone_llama.sh", tmp_path / "scripts")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$(dirname "$0")/told"\n')
    python.chmod(0o755)
    (tmp_path / "scripts" / "setup.sh").write_text(f"root={tmp_path} PATH={tmp_path}:$PATH\n")
    variables = {"BASE_MODEL": "model", "DATA_PATH": "data.jsonl", "INIT_WEIGHTS": "mini"}
    done = script(variables, "--warmup_steps", "2", "--learning_rate", "-1", root=tmp_path)
    assert done.returncode == 0, done.stderr
    program, *words = (tmp_path / "told").read_text().splitlines()
    assert program == f"{tmp_path}/demo/bone_finetuning.py" and "--warmup_ratio" not in words
    told = dict(zip(words, words[1:]))
    assert (told["--learning_rate"], told["--warmup_steps"], told["--init_weights"]) == ("-1", "2", "mini")
