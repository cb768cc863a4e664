"""`rwkv-peft download`: an official base of a hub, here one on this machine."""

import io

import pytest
import torch

from rwkv_peft.cli import commands
from rwkv_peft.cli.errors import UserError
from rwkv_peft.tools.download import OFFICIAL, REPOSITORY
from tools.hub import Hub

NAME = OFFICIAL[0]
PIECE = 10 << 20  # bytes that the client writes at a time


def download(*words):
    return commands.main(["download", *map(str, words)])


def test_a_base_is_downloaded_once_and_a_cut_download_goes_on(tmp_path, capfd):
    saved = io.BytesIO()
    torch.save({"emb.weight": torch.zeros(5 * PIECE // 8)}, saved)
    content = saved.getvalue()
    with Hub(REPOSITORY, NAME, content, cut=1) as hub:
        words = ("0.1B", tmp_path / "models", "--mirror", hub.address)
        assert download(*words) == 0
        assert (tmp_path / "models" / NAME).read_bytes() == content
        assert hub.ranges == ["", f"bytes={PIECE}-"]
        printed = capfd.readouterr()
        assert f"downloaded {tmp_path / 'models' / NAME}" in printed.out
        assert "100 %" in printed.err
        assert download(*words) == 0 and len(hub.ranges) == 2
    assert "is there already" in capfd.readouterr().out


def test_what_cannot_be_downloaded_is_told(tmp_path, monkeypatch):
    def refused(match, *words):
        with pytest.raises(UserError, match=match):
            download(*words)

    refused("5b is neither a size .*0.1b, .* nor the name of a .pth file", "5b")
    refused("is neither a size", "../x.pth")
    refused("--mirror hub is no address; write it as https://", "0.1b", "--mirror", "hub")
    with Hub(REPOSITORY, NAME, b"no model") as hub:
        refused("is no model that PyTorch wrote; delete it", "0.1b", tmp_path, "--mirror", hub.address)
        refused("was not downloaded from http://127.*404", "0.4b", tmp_path, "--mirror", hub.address)
        monkeypatch.setattr("rwkv_peft.checkpoints.atomic.room_at", lambda path: 3)
        refused("needs 8 bytes for rwkv7-g1d-0.1b.*3 free", "0.1b", tmp_path / "full", "--mirror", hub.address)
    refused(
        "was not downloaded from .*goes on where it was, --mirror https",
        "0.1b",
        tmp_path / "gone",
        "--mirror",
        hub.address,
    )
