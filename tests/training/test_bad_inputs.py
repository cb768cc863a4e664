"""Unusable bases, token files and masks are named in one message, before any work."""

import math
import pickle
from pathlib import Path

import pytest
import torch

from rwkv_peft.data.token_file_writer import TokenFileWriter
from training.command_lines import flags, refused, small_files

files = small_files


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
        names = [f"blocks.{i}.att.{name}" for i in range(2) for name in ("x_r", "w0", "a0", "r_k")]
        torch.save(state | {name: torch.ones(1, 1, 64) for name in names}, path)


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


def test_a_base_that_is_not_finite_is_named_before_any_step(files, tiny_state, monkeypatch, capsys):
    """Also in a row of the embedding that no token reads."""
    state = tiny_state()
    state["emb.weight"][79, 3] = math.nan
    torch.save(state, files / "base.pth")
    error = refused(monkeypatch, capsys, flags(files))
    assert "base.pth is not finite: emb.weight holds NaN or Inf, at [79, 3] first" in error
    assert not (files / "out").exists()


@pytest.mark.parametrize("more", [[], ["--dataload", "pad"], ["--dataload", "pack"], ["--val_split", "0.2"]])
@pytest.mark.parametrize("counts", [False, True])
def test_a_mask_that_leaves_nothing_to_learn_is_refused(files, monkeypatch, capsys, more, counts):
    """A mask that counts no token, or only tokens that are never targets: the first, and with --dataload pad those
    beyond --ctx_len."""
    mask = bytearray(300)
    mask[0] = counts
    if "--dataload" in more:
        mask[99] = counts
    (files / "data.mask").write_bytes(mask)
    words = "the loss counts no token of" if counts else "data.mask counts none of 300 tokens"
    assert words in refused(monkeypatch, capsys, flags(files, *more))


def test_tokens_outside_the_vocabulary(files, monkeypatch, capsys):
    with TokenFileWriter(files / "data", vocab_size=300) as writer:
        writer.add([5] * 50 + [80])
    assert "80" in refused(monkeypatch, capsys, flags(files))
