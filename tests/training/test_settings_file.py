"""Settings files: a file of flags means what the flags mean, the command line wins, and a run's config.json is one."""

import json
import os
import sys
from dataclasses import replace

import pytest
import yaml

from rwkv_peft.training.flags.request import parse_run
from training.command_lines import flags, refused, small_files, without_rank
from training.runs import ROOT, finish, start

MEANS = (
    ("bone_r: 8\nlr_init: 5e-6", ("--bone_r", "8", "--lr_init", "5e-6")),
    ("bone_r: 16\ntrain_parts: [time, ln]", ("--bone_r", "16", "--train_parts", "time", "ln")),
    ("--grad_cp: 1\nbone_r: 16\nlr_final: null", ("--bone_r", "16", "--grad_cp", "1")),
    (
        "peft: lora\nlora_config: {lora_r: 4, lora_alpha: 8}",
        ("--lora_config", '{"lora_r":4,"lora_alpha":8}', "--peft", "lora"),
    ),
    ('{"bone_r": 8, "bone_mode": "bat-out"}', ("--bone_r", "8", "--bone_mode", "bat-out")),
    ("bone_r: 16  # no more\n", ("--bone_r", "16")),
)
REFUSED = (
    ("bone_q: 1", "there is no --bone_q; did you mean --bone_r?"),
    ("rank: 3", "there is no --rank here; it is --bone_r"),
    ("generation: 7\nmodel_version: x070", "model_version sets what generation sets already"),
    ("peft: [bone, lora]", "peft is a list, and the flag takes one value"),
    ("train_parts: [[time]]", "train_parts holds lists within a list"),
    ("check_flags: perhaps", "check_flags is ['perhaps'], and takes no value"),
    ("config: other.yaml", "config belongs on the command line"),
    ("bone_r", "holds no flags"),
    ("bone_r: [1", "is no YAML"),
    ("bone_r: much", "argument --bone_r: 'much' is not a whole number"),
)

files = small_files


@pytest.mark.parametrize("text, words", MEANS)
def test_a_file_means_what_its_flags_mean(files, text, words):
    (files / "run.yaml").write_text(text)
    by_file = parse_run([*without_rank(files), "--config", str(files / "run.yaml")])
    by_flags = parse_run([*without_rank(files), *words])
    assert replace(by_file.config, flags={}) == replace(by_flags.config, flags={})
    assert "--config" not in by_file.argv  # so that other ranks read no file that may have changed


def test_the_names_of_every_command_mean_upstreams(files):
    """--adapter names the adapter to start from whatever the method is."""
    shared = {"--load_model": "--model", "--proj_dir": "--output"}
    words = without_rank(files, "--peft", "lora")
    ours = parse_run([*(shared.get(word, word) for word in words), "--adapter", "a.safetensors"]).config
    theirs = parse_run([*words, "--lora_config", '{"lora_load":"a.safetensors"}']).config
    assert replace(ours, flags={}) == replace(theirs, flags={}) and ours.adapter.load == "a.safetensors"


def test_the_command_line_wins_by_any_name_of_a_flag(files):
    (files / "run.yaml").write_text("bone_r: 8\nhead_size_a: 7\n")
    config = parse_run([*flags(files), f"--config={files / 'run.yaml'}", "--head_size", "16"]).config
    assert config.adapter.rank == 16
    assert config.flags["bone_r"] == "16" and config.flags["head_size"] == "16" and "head_size_a" not in config.flags


@pytest.mark.parametrize("text, words", REFUSED)
def test_a_file_that_makes_no_sense_is_refused(files, monkeypatch, capsys, text, words):
    (files / "run.yaml").write_text(text)
    assert words in refused(monkeypatch, capsys, [*without_rank(files), "--config", str(files / "run.yaml")])


@pytest.mark.parametrize(
    "make", (lambda path: None, lambda path: path.write_bytes(b"\xff\xfe\x00"), lambda path: path.mkdir(), os.mkfifo)
)
def test_a_file_that_cannot_be_read_is_refused(files, monkeypatch, capsys, make):
    make(files / "run.yaml")
    assert "run.yaml" in refused(monkeypatch, capsys, [*flags(files), "--config", str(files / "run.yaml")])


def test_files_that_are_written_train_the_same_run(files):
    train = [sys.executable, str(ROOT / "train.py")]
    more = ("--epoch_steps", "2", "--epoch_count", "1")
    more += ("--bone_config", '{"bone_mode":"bat","bone_load":"","bone_r":16}')
    written = files / "run.yaml"
    out, _ = finish(start([*train, *without_rank(files), *more, "--write_config", str(written)]))
    assert str(written) in out and not (files / "out").exists()
    assert yaml.safe_load(written.read_text())["epoch_steps"] == 2
    finish(start([*train, "--config", str(written)]))
    config = files / "out" / "config.json"
    assert json.loads(config.read_text())["flags"]["bone_config"] == more[-1]
    finish(start([*train, "--config", str(config), "--proj_dir", str(files / "again")]))
    first, again = ((files / name / "adapter.safetensors").read_bytes() for name in ("out", "again"))
    assert first == again
