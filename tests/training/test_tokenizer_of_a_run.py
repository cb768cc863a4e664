"""The tokenizer is recorded by preprocess and goes with the run, so that nobody retypes it; another one is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_peft import commands
from rwkv_peft.data.recorded import read_record, vocabulary_of
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.files.base import save_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_state):
    """A folder with base.pth, whose 300 tokens tell no tokenizer, data of bytes, and the run out/ over it, merged."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_model(folder / "base.pth", tiny_state(vocab_size=300))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"{i} birds"}) + "\n" for i in range(8)))
    for line in (
        "preprocess rows.jsonl --output data --tokenizer bytes",
        "train --load_model base.pth --data_file data --proj_dir out --bone_r 16 --ctx_len 8 --dataload pad "
        "--epoch_steps 1 --accelerator cpu --precision fp32",
        "merge --base_model base.pth --bone_checkpoint out/adapter.safetensors --output out/merged.pth",
    ):
        done = subprocess.run(
            [sys.executable, "-m", "rwkv_peft", *line.split()],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT / "RWKV-PEFT"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if line.startswith("train"):
            assert "tokenizer bytes (257 tokens" in done.stdout
    return folder


def test_the_runs_config_names_it(trained):
    assert read_record(trained / "out" / "config.json") == vocabulary_of(load_tokenizer("bytes"))
    assert json.loads((trained / "out" / "config.json").read_text())["adapter"]["method"] == "bone"


@pytest.mark.parametrize(
    "model", [["--model", "base.pth", "--adapter", "out/adapter.safetensors"], ["--model", "out/merged.pth"]]
)
def test_generate_takes_it_from_the_run(trained, model, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    arguments = ["generate", *model, "--prompt", "1 b", "--max_tokens", "2"]
    assert commands.main(arguments) == 0
    assert "note:" not in capsys.readouterr().err
    (trained / "own.txt").write_text("1 'a' 1\n98 'b' 1\n")
    assert commands.main([*arguments[:-4], "--prompt", "b", "--max_tokens", "2", "--tokenizer", "own.txt"]) == 0
    assert "note: the run was trained with bytes (257 tokens" in capsys.readouterr().err


def test_convert_takes_it_from_the_run(trained, capsys):
    pytest.importorskip("gguf")
    assert commands.main(["convert", str(trained / "out/merged.pth"), str(trained / "m.gguf")]) == 0
    assert "vocabulary bytes" in capsys.readouterr().out
