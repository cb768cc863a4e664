"""train.py's command line: what it accepts, and that each mistake is one message with exit code 2, before any work."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_peft.data.binidx import BinidxWriter
from rwkv_peft.errors import UserError, exit_on_user_error
from rwkv_peft.training.flags import build_parser, parse_config
from rwkv_peft.training.run import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path, tiny_state):
    """A base model base.pth (C 64, F 96, vocabulary 80) and data of 300 tokens below 80."""
    torch.save(tiny_state(), tmp_path / "base.pth")
    with BinidxWriter(tmp_path / "data", vocab_size=80) as writer:
        for start in range(3):
            writer.add([1 + (start + i) % 79 for i in range(99)] + [0])
    return tmp_path


def flags(files, *more):
    return ["--load_model", str(files / "base.pth"), "--data_file", str(files / "data"), "--ctx_len", "16", "--bone_r",
            "16", "--proj_dir", str(files / "out"), "--accelerator", "cpu", "--precision", "fp32", *more]


def refused(monkeypatch, capsys, argv):
    """The message of a command that must end with exit code 2 and one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as exit_info:
        exit_on_user_error(main)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_dimensions_are_read_from_the_base(files):
    config = parse_config(flags(files))
    assert (config.model.n_layer, config.model.n_embd, config.model.dim_ffn, config.model.head_size) == (2, 64, 96, 16)
    assert (config.adapter.method, config.adapter.mode, config.adapter.rank) == ("bone", "bat-in", 16)


def test_the_json_form_means_the_same(files):
    argv = flags(files)
    del argv[argv.index("--bone_r") : argv.index("--bone_r") + 2]
    config = parse_config(argv + ["--peft", "bone", "--bone_config", '{"bone_mode":"bat","bone_load":"","bone_r":16}'])
    assert config.adapter == parse_config(flags(files, "--bone_mode", "bat-in")).adapter


def test_rows_of_questions_and_answers_count_their_answers(files):
    sft = parse_config(flags(files, "--data_type", "sft")).data
    assert (sft.dataload, sft.loss_mask) == ("pad", "file")
    stream = parse_config(flags(files)).data
    assert (stream.dataload, stream.loss_mask) == ("get", "none")


def test_every_flag_is_read():
    """No flag is parsed and then forgotten."""
    source = (ROOT / "RWKV-PEFT" / "rwkv_peft" / "training" / "flags.py").read_text()
    config = (ROOT / "RWKV-PEFT" / "rwkv_peft" / "config.py").read_text()
    for action in build_parser()._actions:
        if action.dest in ("help", "model_version"):
            continue
        assert f"{action.dest}: " in config or f"args.{action.dest}" in source or f'"{action.dest}"' in source, action.dest


@pytest.mark.parametrize("more, words", [
    (["--bone_rank", "8"], "no --bone_rank; did you mean --bone_r"),
    (["--bone_mode", "bats"], "'bats' does not exist"),
    (["--bone_r", "64"], "64"),
    (["--bone_mode", "bat-out", "--bone_r", "64"], "96"),
    (["--n_embd", "512"], "--n_embd 512 contradicts"),
    (["--vocab_size", "65536"], "--vocab_size 65536 contradicts"),
    (["--peft", "lora"], "--bone_r belongs to --peft bone"),
    (["--bone_config", '{"bone_rr": 4}'], "did you mean 'bone_r'"),
    (["--bone_config", "{bone_r: 4}"], "not JSON"),
    (["--bone_config", '{"bone_r": 8}'], "give one of them"),
    (["--target_modules", "att.kay"], "att.kay"),
    (["--ctx_len", "5000"], "5000"),
    (["--micro_bsz", "0"], "below 1"),
    (["--beta2", "1.5"], "--beta2 1.5"),
    (["--epoch_begin", "3"], "leaves no epoch"),
    (["--resume"], "no complete checkpoint"),
    (["--bone_load", "nothing.safetensors"], "nothing.safetensors"),
    (["--my_testing", "x070"], "x060"),
    (["--loss_mask", "qa"], "--mask_id"),
    (["--dataload", "only", "--micro_bsz", "2"], "--micro_bsz 2"),
    (["--accelerator", "gpu", "--devices", "99"], "--devices 99"),
])
def test_mistakes_in_flags(files, monkeypatch, capsys, more, words):
    assert words in refused(monkeypatch, capsys, flags(files, *more))
    assert not (files / "out").exists()


def damaged_base(path, kind, tiny_state):
    """Write a base.pth that is wrong in one way."""
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "code":
        class Evil:
            def __reduce__(self):
                return Path.touch, (path.parent / "executed",)

        path.write_bytes(pickle.dumps({"emb.weight": Evil()}))
    elif kind == "states":
        torch.save(tiny_state() | {f"blocks.{i}.att.time_state": torch.zeros(4, 16, 16) for i in range(2)}, path)
    elif kind == "rwkv5":
        state = {key: value for key, value in tiny_state().items() if "maa" not in key and "decay_w" not in key}
        state |= {f"blocks.{i}.att.time_mix_{name}": torch.ones(1, 1, 64) for i in range(2) for name in "kvrg"}
        torch.save(state, path)
    elif kind == "rwkv7":
        state = {key: value for key, value in tiny_state().items() if "time_" not in key}
        state |= {f"blocks.{i}.att.{name}": torch.ones(1, 1, 64) for i in range(2) for name in ("x_r", "w0", "a0", "r_k")}
        torch.save(state, path)


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "code", "rwkv5", "rwkv7", "states"])
def test_bad_base_models(files, tiny_state, monkeypatch, capsys, kind):
    damaged_base(files / "base.pth", kind, tiny_state)
    assert "base.pth" in refused(monkeypatch, capsys, flags(files))
    assert not (files / "executed").exists()


@pytest.mark.parametrize("name", ["data.idx", "data.bin"])
@pytest.mark.parametrize("size", [None, 0, 40])
def test_bad_data_files(files, monkeypatch, capsys, name, size):
    path = files / name
    path.unlink() if size is None else path.write_bytes(path.read_bytes()[:size])
    assert name in refused(monkeypatch, capsys, flags(files))


def test_tokens_outside_the_vocabulary(files, monkeypatch, capsys):
    with BinidxWriter(files / "data", vocab_size=300) as writer:
        writer.add([5] * 50 + [80])
    assert "80" in refused(monkeypatch, capsys, flags(files))


def test_a_new_model_needs_its_dimensions_and_no_adapter(files):
    with pytest.raises(UserError, match="--peft none"):
        parse_config(["--data_file", str(files / "data")])
    with pytest.raises(UserError, match="--n_embd"):
        parse_config(["--data_file", str(files / "data"), "--peft", "none", "--n_layer", "2", "--vocab_size", "80"])


def test_the_command_itself_shows_no_traceback(files):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags(files, "--bone_r", "7")], text=True,
                          capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr and not done.stdout
