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
    given = ("LOAD_MODEL", "DATA_FILE", "PROJ_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in given} | variables
    command = ["sh", str(root / "scripts" / f"bone_rwkv{generation}.sh"), *flags]
    return subprocess.run(command, env=environment, text=True, capture_output=True)


def test_a_users_model_and_rows(tmp_path, tiny_state, accelerator, warm_environment):
    """Either script takes either generation: RWKV-6 here, and RWKV-7 by the same commands in tests/training."""
    torch.save(tiny_state(vocab_size=257, head_size=64, maa_rank=32, decay_rank=64), tmp_path / "base.pth")
    rows = [f"line {i}: " + "to be or not to be " * 3 for i in range(20)]
    (tmp_path / "data.csv").write_text("\n".join(["text", *rows]))
    paths = {"LOAD_MODEL": tmp_path / "base.pth", "DATA_FILE": tmp_path / "data.csv", "PROJ_DIR": tmp_path / "out"}
    settings = {"TOKENIZER": "bytes", "BONE_R": "32", "PRECISION": "fp32", "ACCELERATOR": accelerator}
    (tmp_path / "out").mkdir()
    for ending, old in ((".bin", ""), (".idx", ""), (".json", '{"vocabulary": {}}')):  # by another tokenizer
        (tmp_path / "out" / f"data{ending}").write_text(old)
    done = script(
        warm_environment | {name: str(path) for name, path in paths.items()} | settings,
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
    assert (tmp_path / "out" / "loss.png").exists()
    assert f"talk to it             rwkv-peft generate --model {tmp_path / 'out' / 'merged.pth'} " in done.stdout


def test_rows_that_train_py_reads_stay_rows(tmp_path, tiny_state, accelerator, warm_environment):
    """The model learned to chat, and is tried in a chat."""
    torch.save(tiny_state(vocab_size=257, head_size=64, maa_rank=32, decay_rank=64), tmp_path / "base.pth")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "who?", "response": "you"}) + "\n")
    variables = {
        "LOAD_MODEL": tmp_path / "base.pth",
        "DATA_FILE": tmp_path / "rows.jsonl",
        "PROJ_DIR": tmp_path / "new",
    }
    variables |= {"TOKENIZER": "bytes", "ACCELERATOR": accelerator, "CHECK": "0"} | warm_environment
    flags = "--data_type sft --ctx_len 32 --micro_bsz 1 --epoch_steps 1 --bone_r 32"
    done = script({name: str(value) for name, value in variables.items()}, *flags.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== 1. data" not in done.stdout and "1 document" in done.stdout
    (tried,) = (line for line in done.stdout.splitlines() if line.startswith("talk to it "))
    assert tried.endswith(f"--model {tmp_path / 'new' / 'merged.pth'} --chat")
    new_shell = done.stdout.partition("in a new shell: ")[2].partition("\n")[0]
    if not new_shell.startswith("conda"):  # a function of the user's shell
        lines = f"{new_shell}\n{tried.removeprefix('talk to it ')}"
        answered = in_a_fresh_shell(lines, tmp_path, "who?\n")
        assert answered.returncode == 0 and answered.stdout.startswith("Assistant:"), answered.stderr


def stand_in_for(root, python):
    """The scripts of the main job in root/scripts, with a setup.sh of words alone, and this text as the programs that
    they call."""
    (root / "scripts").mkdir(exist_ok=True)
    for name in ("bone.sh", "bone_rwkv6.sh", "bone_rwkv7.sh"):
        shutil.copy(ROOT / "scripts" / name, root / "scripts")
    words = 'say() { printf \'%s\\n\' "$@"; }; fail() { echo "error: $*" >&2; exit 1; }'
    (root / "scripts" / "setup.sh").write_text(f"root={root} activate=. PATH={root}:$PATH\n{words}\n")
    for name in ("python", "rwkv-peft"):
        (root / name).write_text("#!/bin/sh\n" + python)
        (root / name).chmod(0o755)


def in_a_fresh_shell(lines, folder, typed=""):
    """Run lines as a user does who opens a terminal somewhere and types them."""
    shell = ["sh", "-ec", lines]
    return subprocess.run(shell, cwd=folder, env={"PATH": os.defpath}, input=typed, text=True, capture_output=True)


STAND_IN = """echo "$@" >> "$(dirname "$0")/told"
case "$*" in "preprocess "*bad*) exit 2 ;; esac
"""


@pytest.fixture
def stand_in(tmp_path):
    """Scripts in a folder of their own, whose programs only record their words in told; stand_in(data, *flags) runs
    one of them on a model and data."""
    (tmp_path / "base.pth").touch()

    def run(data, *flags):
        stand_in_for(tmp_path, STAND_IN)
        paths = {"LOAD_MODEL": tmp_path / "base.pth", "DATA_FILE": data, "PROJ_DIR": tmp_path / "out"}
        return script({name: str(path) for name, path in paths.items()}, *flags, root=tmp_path)

    return run


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.json", "in.parquet", "in.txt", "in.csv", "a folder"])
def test_rows_of_every_kind_are_made_into_tokens(stand_in, tmp_path, name):
    (tmp_path / name).mkdir() if name == "a folder" else (tmp_path / name).touch()
    done = stand_in(tmp_path / name)
    assert done.returncode == 0, done.stderr
    made = f"preprocess {tmp_path / name} --tokenizer world --output {tmp_path / 'out' / 'data'} --overwrite\n"
    assert made in (tmp_path / "told").read_text()


def test_a_step_that_fails_ends_the_script(stand_in, tmp_path):
    (tmp_path / "bad.csv").touch()
    done = stand_in(tmp_path / "bad.csv")
    assert done.returncode == 2 and "1. data" in done.stdout and "2. train" not in done.stdout


def test_tokens_that_a_run_has_read_stay(stand_in, tmp_path):
    (tmp_path / "in.csv").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    assert stand_in(tmp_path / "in.csv", "--resume").returncode == 0
    assert "preprocess " in (told := (tmp_path / "told").read_text()) and "--overwrite" not in told


@pytest.mark.parametrize("given", ["set", "set.bin", "set.idx", "in.jsonl"])
def test_token_files_are_taken_as_they_are(stand_in, tmp_path, given):
    for name in ("set", "in.jsonl"):  # the one a folder beside it, the other what it may have been made of
        (tmp_path / f"{name}.idx").touch()
        (tmp_path / f"{name}.bin").touch()
    (tmp_path / "set").mkdir()
    (tmp_path / "in.jsonl").touch()
    assert stand_in(tmp_path / given).returncode == 0
    assert "preprocess" not in (tmp_path / "told").read_text()


def test_the_folder_of_the_run_is_merged_and_checked(stand_in, tmp_path):
    """Merge and check take what holds best in it."""
    (tmp_path / "in.jsonl").touch()
    assert stand_in(tmp_path / "in.jsonl").returncode == 0
    merged = f"--bone_checkpoint {tmp_path / 'out'} --{{}} {tmp_path / 'out' / 'merged.pth'}\n"
    for words in ("output", "merged"):
        assert merged.format(words) in (tmp_path / "told").read_text()


@pytest.mark.parametrize("flag", ["--load_model", "--data_file", "--proj_dir=a"])
def test_paths_as_flags_are_refused_with_the_variables(stand_in, tmp_path, flag):
    """Merge and check would not know them."""
    done = stand_in(tmp_path / "in.jsonl", flag, "a.jsonl")
    assert done.returncode == 1 and "LOAD_MODEL=… DATA_FILE=… PROJ_DIR=…" in done.stderr and "==" not in done.stdout


def test_half_of_a_users_input_is_refused(tmp_path, warm_environment):
    done = script(warm_environment | {"LOAD_MODEL": str(tmp_path / "base.pth")})
    assert done.returncode != 0 and "DATA_FILE: is to name rows" in done.stderr


def test_a_failing_step_ends_the_script(tmp_path, warm_environment):
    paths = {"LOAD_MODEL": tmp_path / "base.pth", "DATA_FILE": tmp_path / "data", "PROJ_DIR": tmp_path}
    done = script(warm_environment | {name: str(path) for name, path in paths.items()})
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
    product = "rwkv.pth" if expected["method"] == "none" else "adapter.safetensors"
    stand_in_for(
        tmp_path,
        'case "$*" in *--check_flags*) ;; *train.py*) printf "%s\\n" "$@" > "$(dirname "$0")/told" ;; '
        f'*) exit 0 ;; esac; mkdir -p "{tmp_path}/out"; touch "{tmp_path}/out/{product}"\n',
    )
    base, out = str(tmp_path / "base.pth"), str(tmp_path / "out")
    variables = {"LOAD_MODEL": base, "DATA_FILE": "data", "PROJ_DIR": out, "BONE_R": "32"}
    done = script(variables, *flags.split(), root=tmp_path)
    assert done.returncode == 0, done.stderr
    adapter = parse_run((tmp_path / "told").read_text().splitlines()[1:]).config.adapter
    assert {name: getattr(adapter, name) for name in expected} == expected
    assert ("3. merge" not in done.stdout) == (adapter.method == "none")


@pytest.mark.parametrize("generation, folder", [(6, "demo"), (7, "demo-rwkv7")])
@pytest.mark.parametrize("flags", [[], ["--lr_init", "1e-3", "--resume"], ["--resume=auto"]])
def test_the_demo_starts_anew_unless_it_resumes(tmp_path, flags, generation, folder):
    # it finds the flags right, and ends the script at the first step
    stand_in_for(tmp_path, 'case "$*" in *--check_flags*) echo "$@" > "$(dirname "$0")/told"; exit 0 ;; esac\nexit 1\n')
    checkpoint = tmp_path / "out" / folder / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    assert script({}, *flags, root=tmp_path, generation=generation).returncode == 1
    assert f"--load_model {tmp_path}/demo/rwkv{generation}-demo.pth" in (tmp_path / "told").read_text()
    assert checkpoint.exists() == bool(flags)


def test_the_body_alone_says_what_to_run(warm_environment):
    command = ["sh", str(ROOT / "scripts" / "bone.sh")]
    done = subprocess.run(command, env=os.environ | warm_environment, text=True, capture_output=True)
    assert done.returncode != 0 and "bone_rwkv6.sh and bone_rwkv7.sh" in done.stderr
