"""preprocess records the tokenizer, and it goes with the run, so that nobody retypes it; another one is reported."""

import json
import sys

import pytest

from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.cli import commands
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.recorded import Vocabulary, read_record, vocabulary_of
from rwkv_peft.data.tokenizer import load_tokenizer
from training.runs import ROOT, finish, start


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_state):
    """A folder with base.pth, whose 300 tokens identify no tokenizer, data of bytes, and out/, a merged run on them."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_model(folder / "base.pth", tiny_state(vocab_size=300))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"{i} birds"}) + "\n" for i in range(8)))
    assert commands.main(f"preprocess {folder}/rows.jsonl --output {folder}/data --tokenizer bytes".split()) == 0
    flags = (
        f"--load_model {folder}/base.pth --data_file {folder}/data --proj_dir {folder}/out --bone_r 16 --ctx_len 8 "
        "--dataload pad --epoch_steps 1 --accelerator cpu --precision fp32"
    )
    out, _ = finish(start([sys.executable, str(ROOT / "train.py"), *flags.split()]))
    assert "tokenizer bytes (257 tokens" in out
    files = f"--base_model {folder}/base.pth --bone_checkpoint {folder}/out/adapter.safetensors"
    assert commands.main(f"merge {files} --output {folder}/out/merged.pth".split()) == 0
    return folder


def test_the_runs_config_names_it(trained):
    assert read_record(trained / "out" / "config.json") == vocabulary_of(load_tokenizer("bytes"))
    assert json.loads((trained / "out" / "config.json").read_text())["adapter"]["method"] == "bone"


def test_a_name_in_a_file_is_told_in_one_line():
    assert str(Vocabulary("\x1b[31mworld\nerror: forged", "0\n", 3)).isprintable()


def test_an_adapter_tells_how_it_came_to_be(trained, capsys, tiny_state):
    assert commands.main(["inspect", str(trained / "out")]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["base"].startswith("base.pth, fingerprint ") and told["tokenizer"].startswith("bytes (257 tokens, ")
    assert told["data"] == "--data_type binidx --dataload pad --loss_mask none --ctx_len 8"
    assert told["rate"] == "0.0013 to 0.00013, cosine" and told["versions"].startswith("rwkv_peft 0")
    save_model(trained / "other.pth", tiny_state(vocab_size=300, seed=1))
    merge = f"merge --base_model {trained}/other.pth --bone_checkpoint {trained}/out --output {trained}/x.pth"
    with pytest.raises(UserError, match="was trained on another base: base.pth, fingerprint"):
        commands.main(merge.split())


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


def test_validation_data_of_another_tokenizer_is_refused(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    (trained / "words.txt").write_text("".join(f"{i + 1} {chr(i)!r} 1\n" for i in range(32, 128)))
    for tokenizer in ("bytes", "words.txt"):
        command = f"preprocess rows.jsonl --output held-{tokenizer} --tokenizer {tokenizer}"
        assert commands.main(command.split()) == 0
    flags = "--load_model base.pth --data_file data --bone_r 16 --ctx_len 8 --dataload pad --show_samples 1".split()
    for flag in ("--val_data", "--retain_data"):
        assert commands.main(["train", *flags, flag, "held-bytes"]) == 0
        with pytest.raises(UserError, match=f"{flag} held-words.txt was made with .*, and --data_file data with"):
            commands.main(["train", *flags, flag, "held-words.txt"])
