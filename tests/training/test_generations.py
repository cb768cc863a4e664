"""RWKV-7 by the commands that a user types: a new model, an adapter on it, resumed, merged, checked."""

import pytest
import torch

from rwkv_peft.files.base import open_base
from rwkv_peft.release.check import main as check
from rwkv_peft.release.merge_command import main as merge
from training.runs import metrics

NEW = ("--load_model", "", "--generation", "7", "--peft", "none", "--precision", "fp32", "--epoch_count", "1")
SIZES = ("--n_layer", "2", "--n_embd", "64", "--vocab_size", "80")


@pytest.fixture(scope="module")
def base(files, train):
    """A new RWKV-7 of a few steps: its matrices that start at zero have left it."""
    train("new", *NEW, *SIZES, "--lr_init", "1e-4", "--lr_final", "1e-4")
    return files / "new" / "rwkv.pth"


def test_a_new_model_is_an_rwkv7_in_the_official_order(base):
    model = open_base(base)
    assert model.family.version == "x070" and list(model.tensors) == list(model.family.shapes(model.config))
    assert model.tensors["blocks.1.att.output.weight"].any()


def test_an_adapter_trains_merges_and_unmerges(files, base, train, tmp_path):
    on_base = ("--load_model", str(base), "--precision", "fp32")
    out, _ = train("whole", *on_base)
    assert "RWKV-7" in out
    assert len(metrics(files, "whole")) == 8
    adapter = files / "whole" / "adapter.safetensors"
    of_base = ["--base_model", str(base), "--bone_checkpoint", str(adapter)]
    assert merge([*of_base, "--output", str(tmp_path / "merged.pth")]) == 0
    assert check([*of_base, "--merged", str(tmp_path / "merged.pth"), "--tokens", "20"]) == 0
    merged = open_base(tmp_path / "merged.pth").tensors
    assert all(not torch.equal(merged[key], open_base(base).tensors[key]) for key in merged if "att.key" in key)
    argv = ["--unmerge", "--base_model", str(tmp_path / "merged.pth"), "--bone_checkpoint", str(adapter)]
    assert merge([*argv, "--output", str(tmp_path / "unmerged.pth")]) == 0
    unmerged = open_base(tmp_path / "unmerged.pth").tensors
    for key, tensor in open_base(base).tensors.items():
        torch.testing.assert_close(unmerged[key], tensor, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_has_the_bits_of_a_whole_one(files, base, train):
    on_base = ("--load_model", str(base), "--precision", "fp32", "--lr_schedule", "constant")
    train("constant", *on_base)
    train("resumed", *on_base, "--epoch_count", "1")
    train("resumed", *on_base, "--resume")
    first, second = ((files / name / "adapter.safetensors").read_bytes() for name in ("constant", "resumed"))
    assert first == second


def test_an_adapter_of_rwkv6_is_refused(files, base, train):
    train("six", "--epoch_count", "1", "--epoch_steps", "1")
    adapter = str(files / "six" / "adapter.safetensors")
    _, err = train("refused", "--load_model", str(base), "--bone_load", adapter, code=2)
    assert "Traceback" not in err
