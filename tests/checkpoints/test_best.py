"""The folder of a run stands for what holds best for held-out rows, and commands say so."""

import json
import os

import pytest
import torch

from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.adapters import adapter_of_run, product_of_run, read_adapter
from rwkv_peft.checkpoints.best import main, take
from rwkv_peft.release.push import files_of


@pytest.fixture
def run(tmp_path):
    """Make a run's folder with the newest and the best of a file, validation losses of ten steps of 8 samples each,
    and settings."""

    def made(*losses, name="adapter", ending=".safetensors", **settings):
        lines = [{"step": 0, "samples": 8, "val_start": 3.0}]
        lines += [{"step": 10 * n - 1, "samples": 80 * n, "val_loss": loss} for n, loss in enumerate(losses, 1)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"val_lo')
        (tmp_path / "config.json").write_text(json.dumps(settings))
        for label in ("", "-best"):
            (tmp_path / f"{name}{label}{ending}").touch()
        return tmp_path

    return made


@pytest.mark.parametrize(
    "losses, label",
    [((1.0, 0.5, 0.2), ""), ((1.0, 0.5, 0.6), ""), ((1.0, 0.5, 0.9), "-best"), ((3.2, 3.1, 4.0), "-best"), ((), "")],
)
@pytest.mark.parametrize("name, ending", [("adapter", ".safetensors"), ("rwkv", ".pth")])
def test_the_best_is_taken_if_it_is_clearly_better(run, losses, label, name, ending, capsys):
    folder = run(*losses, name=name, ending=ending)
    path = folder / f"{name}{label}{ending}"
    assert product_of_run(folder, tell=True) == path and files_of(folder, None) == [path]
    capsys.readouterr()
    assert main([str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{path}\n" and bool(err) == bool(label)
    if label:
        lowest, last = min(losses), losses[-1]
        assert f"{lowest:.4f}, and was {last:.4f} after step 30; to take what trained last, name {folder / name}" in err
    other = take(folder).other
    assert {path, other} == set(folder.glob(f"{name}*")) and product_of_run(other, tell=True) == other


def test_losses_on_other_rows_and_what_is_no_loss_do_not_count(run):
    assert take(run(0.1, 0.9, 0.8)).note and not take(run(0.1, 0.9, 0.8, validated_from=80)).note
    for lines in ('{"step": "x", "val_loss": 0.1}', '{"step": 1, "val_loss": 1e999}', "[" * 5000 + '"val_', ""):
        folder = run(0.5, 0.4)
        (folder / "metrics.jsonl").write_text(lines + "\n" + (folder / "metrics.jsonl").read_text())
        assert take(folder).path.name == "adapter.safetensors"
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    assert take(folder).path.name == "adapter.safetensors"
    (folder / "adapter.safetensors").unlink()  # the run ended before its first save
    assert take(folder).other is None


def test_reading_the_folder_tells_which_adapter_it_is(run, capsys):
    folder = run(1.0, 0.5, 0.9)
    for number, label in enumerate(("", "-best")):
        tensors = {"blocks.0.ffn.key.bone": torch.full((8, 192), float(number))}
        save_adapter(folder / f"adapter{label}.safetensors", tensors, AdapterMetadata("bone", 8, targets=("ffn.key",)))
    assert read_adapter(folder).tensors["blocks.0.ffn.key.bone"].unique() == 1
    assert capsys.readouterr().err.startswith(f"note: {adapter_of_run(folder)} is taken")
    assert read_adapter(folder / "adapter.safetensors").tensors["blocks.0.ffn.key.bone"].unique() == 0
    assert capsys.readouterr().err == ""
