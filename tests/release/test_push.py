"""rwkv-peft push: an adapter, a model and their card reach a hub, here one in memory behind the official client."""

from types import SimpleNamespace

import pytest
import torch

from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.cli.errors import UserError
from rwkv_peft.release.push import MARK, cell, files_of, main, write_card


@pytest.fixture
def adapter_file(tmp_path):
    (tmp_path / "run").mkdir()
    told = AdapterMetadata("bone", 8, targets=("ffn.key",), generation="x070")
    save_adapter(tmp_path / "run" / "adapter.safetensors", {"blocks.0.ffn.key.bone": torch.zeros(8, 192)}, told)
    return tmp_path / "run" / "adapter.safetensors"


@pytest.fixture
def hub(monkeypatch):
    """A hub that keeps its repositories' settings (made), and the files and messages of commits (stored, messages)."""
    client = pytest.importorskip("huggingface_hub")
    kept = SimpleNamespace(made={}, stored={}, messages=[], token="hf_right")

    class Api:
        endpoint = "https://hub"

        def create_repo(self, repo, private, exist_ok):
            if kept.token != "hf_right":
                raise client.errors.HfHubHTTPError("Invalid credentials")
            kept.made[repo] = private

        def create_commit(self, repo, operations, commit_message):
            for operation in operations:
                with operation.as_file() as file:
                    kept.stored[operation.path_in_repo] = file.read()
            kept.messages.append(commit_message)
            return SimpleNamespace(commit_url=f"{self.endpoint}/{repo}/commit/{len(kept.messages)}")

    monkeypatch.setattr(client, "HfApi", Api)
    monkeypatch.setattr(client, "get_token", lambda: kept.token)
    return kept


def test_a_run_reaches_the_hub_with_its_card(hub, adapter_file, capsys):
    folder = adapter_file.parent
    (folder / "config.json").write_text("{}")
    assert main([str(folder), "me/mine", "--private", "--message", "First"]) == 0
    assert "pushed     2 files to https://hub/me/mine/commit/1" in capsys.readouterr().out
    assert sorted(hub.stored) == ["README.md", "adapter.safetensors"]  # config.json names folders of this machine
    assert hub.stored["adapter.safetensors"] == adapter_file.read_bytes() and hub.messages == ["First"]
    assert b"--bone_checkpoint adapter.safetensors" in hub.stored["README.md"] and hub.made == {"me/mine": True}
    for hub.token, message in (
        ("hf_wrong", "me/mine was not pushed to https://hub"),
        (None, "run `hf auth login` first"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(folder), "me/mine"])


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(UserError, match="holds none of adapter.safetensors, rwkv.pth"):
        files_of(tmp_path, None)
    with pytest.raises(UserError, match="adapter-best.safetensors: no such file"):
        files_of(tmp_path, ["adapter-best.safetensors"])
    (tmp_path / "merged.pth").touch()
    assert files_of(tmp_path / "merged.pth", None) == files_of(tmp_path, None) == [tmp_path / "merged.pth"]
    with pytest.raises(UserError, match="--files a.pth are files in a folder"):
        files_of(tmp_path / "merged.pth", ["a.pth"])


def test_no_link_in_a_folder_of_a_stranger_is_pushed(adapter_file):
    (adapter_file.parent / "README.md").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="README.md: a link may lead to any file of yours"):
        main([str(adapter_file.parent), "me/mine", "--dry_run"])


def test_a_readme_of_the_user_stays(tmp_path):
    assert write_card(tmp_path, f"{MARK}\nold\n") and write_card(tmp_path, f"{MARK}\nnew\n")
    assert "new" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    assert not write_card(tmp_path, "other") and (tmp_path / "README.md").read_text() == "mine"


def test_no_name_of_a_file_writes_markup_into_a_card():
    assert cell("a|b<img>\n[x](y)_*`") == "a\\|b&lt;img> \\[x\\](y)\\_\\*\\`"


def test_a_card_of_ours_tells_of_what_is_pushed(adapter_file, monkeypatch):
    pushed, folder = {}, adapter_file.parent
    monkeypatch.setattr("rwkv_peft.release.push.push", lambda repo, contents, *_: pushed.update(contents))
    for name, written in (("adapter-best.safetensors", False), ("adapter.safetensors", True)):
        write_card(folder, f"{MARK}\n`{name}`:\n")
        assert main([str(folder), "me/mine"]) == 0
        assert (
            pushed["README.md"] == folder / "README.md" if written else b"`adapter.safetensors`:" in pushed["README.md"]
        )
