"""scripts/bone_rwkv6.sh and bone_rwkv7.sh with a user's model and data: rows in, a merged model out that a foreign
runtime agrees with."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from rwkv_peft.training.flags.request import parse_run

ROOT = Path(__file__).resolve().parents[2]


def script(variables, *flags, root=ROOT, generation=6):
    environment = {
        key: value for key, value in os.environ.items() if key not in ("LOAD_MODEL", "DATA_FILE", "PROJ_DIR")
    }
    return subprocess.run(
        ["sh", str(root / "scripts" / f"bone_rwkv{generation}.sh"), *flags],
        env=environment | variables,
        text=True,
        capture_output=True,
    )


def test_a_users_model_and_rows(tmp_path, tiny_state, accelerator, warm_environment):
    """Either script takes either generation: RWKV-6 here, and RWKV-7 by the same commands in tests/training."""
    torch.save(tiny_state(vocab_size=257, head_size=64, maa_rank=32, decay_rank=64), tmp_path / "base.pth")
    rows = [f"line {i}: " + "to be or not to be " * 3 for i in range(20)]
    (tmp_path / "data.csv").write_text("\n".join(["text", *rows]))
    (tmp_path / "out").mkdir()
    for ending, old in ((".bin", ""), (".idx", ""), (".json", '{"vocabulary": {}}')):  # by another tokenizer
        (tmp_path / "out" / f"data{ending}").write_text(old)
    done = script(
        warm_environment
        | {
            "LOAD_MODEL": str(tmp_path / "base.pth"),
            "DATA_FILE": str(tmp_path / "data.csv"),
            "PROJ_DIR": str(tmp_path / "out"),
            "TOKENIZER": "bytes",
            "BONE_R": "32",
            "PRECISION": "fp32",
            "ACCELERATOR": accelerator,
        },
        *"--ctx_len 32 --micro_bsz 4 --epoch_steps 5 --lr_init 1e-2".split(),
        generation=7,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for step in ("1. data", "2. train", "3. merge", "4. check"):
        assert f"== {step}" in done.stdout
    base, merged = torch.load(tmp_path / "base.pth"), torch.load(tmp_path / "out" / "merged.pth")
    assert list(base) == list(merged)
    assert not torch.equal(base["blocks.0.att.key.weight"], merged["blocks.0.att.key.weight"])
    assert torch.equal(base["emb.weight"], merged["emb.weight"])
    for name in ("adapter.safetensors", "merged.pth", "loss.png"):
        assert f" {tmp_path / 'out' / name}\n" in done.stdout
    if "conda activate" in done.stdout:  # a function of the user's shell
        return
    tried = in_a_fresh_shell(done.stdout.split("Try it:")[1], tmp_path)
    assert tried.returncode == 0 and tried.stderr == "" and tried.stdout.endswith("\n"), tried.stderr


def test_a_models_and_datas_flags_are_those_of_train_py(tmp_path, tiny_state, accelerator, warm_environment):
    """The trained adapter is merged: --proj_dir overrides PROJ_DIR, which has another run's adapter. Rows of
    --data_type sft stay rows, and a model that learned to chat is tried in a chat."""
    torch.save(tiny_state(vocab_size=257, head_size=64, maa_rank=32, decay_rank=64), tmp_path / "base.pth")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "who?", "response": "you"}) + "\n")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter.safetensors").write_bytes(b"of another run")
    flags = f"--load_model={tmp_path / 'base.pth'} --data_file {tmp_path / 'rows.jsonl'} --proj_dir {tmp_path / 'new'}"
    flags += " --data_type sft --ctx_len 32 --micro_bsz 1 --epoch_steps 1 --bone_r 32"
    variables = {"PROJ_DIR": str(tmp_path / "old"), "TOKENIZER": "bytes", "ACCELERATOR": accelerator, "CHECK": "0"}
    done = script(warm_environment | variables, *flags.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== 1. data" not in done.stdout and "1 document" in done.stdout
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == ["adapter.safetensors"]
    assert (tmp_path / "new" / "merged.pth").exists() and f" {tmp_path / 'new' / 'merged.pth'}\n" in done.stdout
    lines = done.stdout.split("Try it:")[1]
    assert lines.endswith(f"--model {tmp_path / 'new' / 'merged.pth'} --tokenizer bytes --chat\n")
    if "conda activate" not in lines:  # a function of the user's shell
        tried = in_a_fresh_shell(lines, tmp_path, "who?\n")
        assert tried.returncode == 0 and tried.stdout.startswith("Assistant:"), tried.stderr


@pytest.mark.parametrize("flag", ["--load_model", "--data_file", "--proj_dir"])
def test_a_flag_without_its_path_is_told(flag):
    done = script({}, flag)
    assert done.returncode == 1 and f"{flag}: one path is due" in done.stderr and "==" not in done.stdout


def copy_scripts(root):
    """The scripts of the main job in root/scripts, without setup.sh."""
    (root / "scripts").mkdir()
    for name in ("bone.sh", "bone_rwkv6.sh", "bone_rwkv7.sh"):
        shutil.copy(ROOT / "scripts" / name, root / "scripts")


def in_a_fresh_shell(lines, folder, typed=""):
    """Run lines as a user does who opens a terminal somewhere and types them."""
    shell = ["sh", "-ec", lines]
    return subprocess.run(shell, cwd=folder, env={"PATH": os.defpath}, input=typed, text=True, capture_output=True)


STAND_IN = """#!/bin/sh
case "$2" in rwkv_peft) echo "$@" >> "$(dirname "$0")/told" ;; esac
case "$2" in rwkv_peft.files.best) echo OUT/adapter-best.safetensors ;; esac
case "$*" in *--proj_dir*) echo '  "opening": "OPENING",' > OUT/config.json ;; esac
"""
WORDS = (
    'say() { echo "$*"; }; fail() { echo "error: $*" >&2; exit 1; }; quoted() { echo "$1"; }; activate() { echo .; }'
)


@pytest.fixture
def stand_in(tmp_path):
    """Scripts in a folder of their own, with a python that only records the package's commands in told;
    stand_in(variables, *flags, opening=) runs one of them on a model and data."""
    copy_scripts(tmp_path)
    (tmp_path / "scripts" / "setup.sh").write_text(f"root={tmp_path} python={tmp_path / 'python'}\n{WORDS}\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "base.pth").touch()

    def run(data, *flags, opening=""):
        (tmp_path / "python").write_text(STAND_IN.replace("OPENING", opening).replace("OUT", str(tmp_path / "out")))
        (tmp_path / "python").chmod(0o755)
        variables = {
            "LOAD_MODEL": str(tmp_path / "base.pth"),
            "DATA_FILE": str(data),
            "PROJ_DIR": str(tmp_path / "out"),
        }
        return script(variables, *flags, root=tmp_path)

    return run


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.json", "in.parquet", "in.txt", "in.csv", "a folder"])
def test_rows_of_every_kind_are_made_into_tokens(stand_in, tmp_path, name):
    (tmp_path / name).mkdir() if name == "a folder" else (tmp_path / name).touch()
    done = stand_in(tmp_path / name)
    assert done.returncode == 0, done.stderr
    command = f"{tmp_path}/RWKV-PEFT/rwkv_peft/children.py rwkv_peft preprocess"
    made = f"{command} {tmp_path / name} --tokenizer world --output {tmp_path / 'out' / 'data'}\n"
    assert (tmp_path / "told").read_text().startswith(made)


@pytest.mark.parametrize("given", ["set", "set.bin", "set.idx", "in.jsonl", "folder of sets"])
def test_token_files_are_taken_as_they_are(stand_in, tmp_path, given):
    for name in ("set", "in.jsonl"):  # the one a folder beside it, the other what it may have been made of
        (tmp_path / f"{name}.idx").touch()
        (tmp_path / f"{name}.bin").touch()
    (tmp_path / "set").mkdir()
    (tmp_path / "in.jsonl").touch()
    (tmp_path / "folder of sets").mkdir()
    (tmp_path / "folder of sets" / "set.idx").touch()  # which train.py names
    assert stand_in(tmp_path / given).returncode == 0
    assert "preprocess" not in (tmp_path / "told").read_text()


@pytest.mark.parametrize(
    "opening, tried",
    [
        ("Assistant:", " --chat"),
        ("Assistant: <think", " --chat --think on"),
        ("Assistant: <think></think", " --chat --think off"),
        ("Response:", r" --escapes --stop '\n\nInstruction:' "),
        ("Answer:", r" --escapes --stop '\n\nQuestion:' "),
        ("", " --escapes --stop '"),
    ],
)
def test_what_learned_to_chat_is_tried_by_a_chat(stand_in, tmp_path, opening, tried):
    (tmp_path / "in.jsonl").touch()
    done = stand_in(tmp_path / "in.jsonl", opening=opening)
    said = done.stdout.split("rwkv-peft generate --model ")[1].partition("merged.pth")[2]
    assert said == f"{tried}\n" if "--chat" in tried else said.startswith(tried)


def test_what_holds_best_is_merged_checked_and_told(stand_in, tmp_path):
    (tmp_path / "in.jsonl").touch()
    done, best = stand_in(tmp_path / "in.jsonl"), tmp_path / "out" / "adapter-best.safetensors"
    assert f"--bone_checkpoint {best} --merged" in (tmp_path / "told").read_text()
    assert f"adapter     {best}\n" in done.stdout


@pytest.mark.parametrize("flag", ["--load_model", "--data_file", "--proj_dir"])
def test_two_paths_behind_a_flag_are_told(stand_in, tmp_path, flag):
    done = stand_in(tmp_path / "in.jsonl", flag, "a.jsonl", "b.jsonl", "--ctx_len", "8")
    assert done.returncode == 1 and f"{flag} takes one path, and b.jsonl follows it" in done.stderr
    assert "==" not in done.stdout


def test_half_of_a_users_input_is_refused(tmp_path):
    done = script({"LOAD_MODEL": str(tmp_path / "base.pth")})
    assert done.returncode != 0 and "without DATA_FILE" in done.stderr


def test_a_failing_step_ends_the_script(tmp_path, warm_environment):
    done = script(
        warm_environment
        | {"LOAD_MODEL": str(tmp_path / "base.pth"), "DATA_FILE": str(tmp_path / "data"), "PROJ_DIR": str(tmp_path)}
    )
    assert done.returncode == 2 and "base.pth" in done.stderr and "3. merge" not in done.stdout


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lr_init", "x"], "--lr_init: 'x' is not a number"),
        (["--bone_mode", "bat", "--bone_r", "0"], "--bone_r"),
        (["--dataload", "only"], "--micro_bsz 8"),
        (["--devices", "99", "--accelerator", "gpu"], "--devices 99"),
    ],
)
def test_a_mistaken_flag_is_told_before_the_demo_begins(tmp_path, flags, message, warm_environment):
    done = script(warm_environment | {"PROJ_DIR": str(tmp_path / "out")}, *flags)
    assert done.returncode == 2 and message in done.stderr and "==" not in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_a_run_is_told_before_the_demo_begins(tmp_path, warm_environment):
    (tmp_path / "adapter.safetensors").touch()
    done = script(warm_environment | {"PROJ_DIR": str(tmp_path)})
    assert done.returncode == 2 and "already holds adapter.safetensors" in done.stderr and "==" not in done.stdout


@pytest.mark.parametrize("generation", [6, 7])
def test_help_is_the_scripts_own(generation):
    done = script({}, "--help", generation=generation)
    assert done.returncode == 0 and done.stdout.startswith("Trains Bone") and "LOAD_MODEL=base.pth" in done.stdout


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", {"method": "bone", "mode": "bat-in", "rank": 32}),
        ("--bone_r 16 --bone_mode=bone", {"method": "bone", "mode": "bone", "rank": 16}),
        ("--peft lora", {"method": "lora", "rank": 64}),
        ('--peft lora --lora_config {"lora_r":8}', {"method": "lora", "rank": 8}),
        ('--bone_config {"bone_mode":"bat-out","bone_r":8}', {"method": "bone", "mode": "bat-out", "rank": 8}),
        ("--peft=none", {"method": "none"}),
    ],
)
def test_a_users_flags_say_what_trains(tmp_path, tiny_state, flags, expected):
    torch.save(tiny_state(), tmp_path / "base.pth")
    copy_scripts(tmp_path)
    stand_in = tmp_path / "python"
    product = "rwkv.pth" if expected["method"] == "none" else "adapter.safetensors"
    stand_in.write_text(
        f'#!/bin/sh\ncase "$*" in *train.py*) printf "%s\\n" "$@" > "$(dirname "$0")/told" ;; '
        f'*files.best*) echo "{product}" ;; esac\n'
    )
    stand_in.chmod(0o755)
    words = 'say() { echo "$*"; }; quoted() { echo "$1"; }; activate() { echo .; }'
    (tmp_path / "scripts" / "setup.sh").write_text(f"root={tmp_path} python={stand_in}\n{words}\n")
    base, out = str(tmp_path / "base.pth"), str(tmp_path / "out")
    variables = {"LOAD_MODEL": base, "DATA_FILE": "data", "PROJ_DIR": out, "BONE_R": "32"}
    done = script(variables, *flags.split(), root=tmp_path)
    assert done.returncode == 0, done.stderr
    adapter = parse_run((tmp_path / "told").read_text().splitlines()[1:]).config.adapter
    assert {name: getattr(adapter, name) for name in expected} == expected
    assert ("rwkv.pth" in done.stdout) == (adapter.method == "none")


@pytest.mark.parametrize("generation, folder", [(6, "demo"), (7, "demo-rwkv7")])
@pytest.mark.parametrize("flags", [[], ["--lr_init", "1e-3", "--resume"], ["--resume=auto"]])
def test_the_demo_starts_anew_unless_it_resumes(tmp_path, flags, generation, folder):
    copy_scripts(tmp_path)
    python = tmp_path / "python"  # it finds the flags right, and ends the script at the first step
    python.write_text(
        '#!/bin/sh\ncase "$*" in *--check_flags*) echo "$@" > "$(dirname "$0")/told"; exit 0 ;; esac\nexit 1\n'
    )
    python.chmod(0o755)
    (tmp_path / "scripts" / "setup.sh").write_text(f"root={tmp_path} python={python}\n")
    checkpoint = tmp_path / "out" / folder / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    assert script({}, *flags, root=tmp_path, generation=generation).returncode == 1
    assert f"--load_model {tmp_path}/demo/rwkv{generation}-demo.pth" in (tmp_path / "told").read_text()
    assert checkpoint.exists() == bool(flags)


def test_the_body_alone_says_what_to_run():
    done = subprocess.run(["sh", str(ROOT / "scripts" / "bone.sh")], text=True, capture_output=True)
    assert done.returncode != 0 and "bone_rwkv6.sh and bone_rwkv7.sh" in done.stderr
