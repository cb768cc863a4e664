"""`rwkv-peft inspect` names every kind of file correctly; `rwkv-peft push` sends an adapter, a model and their card to
a hub, here one in memory behind the official client."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.base import base_of, save_model
from rwkv_peft.checkpoints.state_file import read_states
from rwkv_peft.cli.commands import main
from rwkv_peft.cli.errors import UserError
from rwkv_peft.release.card import MARK, cell, write_card
from rwkv_peft.release.push import files_of
from rwkv_peft.release.push import main as push


@pytest.fixture
def folder(tmp_path, tiny_state):
    """A folder with a model and an adapter on it."""
    state = tiny_state(dtype=torch.bfloat16, vocab_size=257)
    save_model(tmp_path / "base.pth", state)
    bone = {"blocks.1.att.key.bone": torch.ones(8, 64), "blocks.0.ln1.weight": state["blocks.0.ln1.weight"]}
    settings = dict(rank=8, targets=("att.key",), base_fingerprint=base_of(state).fingerprint, precision="bf16")
    save_adapter(tmp_path / "bone.safetensors", bone, AdapterMetadata("bone", **settings))
    return tmp_path


def inspect(capsys, *words):
    capsys.readouterr()
    assert main(["inspect", *map(str, words)]) == 0
    return capsys.readouterr().out


def convert(folder, *words):
    main(["convert", *(str(folder / word) if "." in word or word == "hf" else word for word in words)])


def test_a_model_is_the_same_in_every_format(folder, capsys):
    convert(folder, "base.pth", "m.safetensors")
    convert(folder, "base.pth", "hf")
    plain = inspect(capsys, folder / "base.pth")
    for words in ("model, RWKV-6 (x060), official names", "n_layer 2, n_embd 64, vocab_size 257", "bfloat16"):
        assert words in plain
    for name, names in (("m.safetensors", "web-rwkv, Ai00"), ("hf", "Hugging Face")):
        assert inspect(capsys, folder / name) == plain.replace("official", names)


def test_an_adapter_says_what_it_is_and_what_it_was_trained_on(folder, capsys):
    out = inspect(capsys, folder / "bone.safetensors")
    told = ("written by rwkv_peft", "Bone bone, rank 8", "1: att.key", "1 tensor of the base\n", "bf16, --quant none")
    assert all(words in out for words in told)
    assert base_of(torch.load(folder / "base.pth")).fingerprint in out
    convert(folder, "bone.safetensors", "flat.pth")
    assert "adapter, written by RWKV-PEFT" in inspect(capsys, folder / "flat.pth")
    torch.save({"blocks.0.att.key.bone": torch.ones(4, 16, 16)}, folder / "old.pth")
    out = inspect(capsys, folder / "old.pth")
    assert "adapter of RWKV-PEFT: 1 bone" in out and "--bone_mode" in out
    assert "Bone bat-out, rank 16" in inspect(capsys, folder / "old.pth", "--bone_mode", "bat-out")


@pytest.mark.parametrize(
    "name, base", [("RWKV/rwkv-6-1b6", "RWKV/rwkv-6-1b6"), ("/home/me/rwkv6.pth", "rwkv6.pth"), (None, "unknown")]
)
def test_a_folder_of_peft_names_its_base(tmp_path, capsys, name, base):
    tensors = {f"base_model.model.blocks.0.att.key.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": name}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lines = [line.split(maxsplit=1) for line in inspect(capsys, tmp_path).splitlines()]
    assert ["base", base] in lines


def test_of_states_that_trained_alone_no_tensor_is_said_to_be_the_base_s(folder, capsys):
    states = {f"blocks.{i}.att.time_state": torch.zeros(4, 16, 16) for i in range(2)}
    save_adapter(folder / "states.safetensors", states, AdapterMetadata("none", rank=0, targets=()))
    assert "trained whole  2 states\n" in inspect(capsys, folder / "states.safetensors")


def test_a_saved_chat_has_shifts(folder, capsys):
    words = ["--model", str(folder / "base.pth"), "--prompt", "a", "--max_tokens", "1"]
    assert main(["generate", *words, "--save_state", str(folder / "chat.pth")]) == 0
    told = "time states of 2 layers (with shifts, from which only rwkv-peft starts), (heads, N, N) = (4, 16, 16)\n"
    assert told in inspect(capsys, folder / "chat.pth")


def test_states_that_a_wrapper_s_prefix_names_are_states(folder, capsys):
    states = {f"blocks.{n}.att.time_state": torch.rand(4, 16, 16) for n in range(2)}
    save_model(folder / "wrapped.pth", {f"model.{key}": tensor for key, tensor in states.items()})
    assert "time states of 2 layers" in inspect(capsys, folder / "wrapped.pth")
    found = read_states(folder / "wrapped.pth").tensors
    assert list(found) == list(states) and all(torch.equal(found[key], states[key]) for key in states)


def test_states_foreign_files_and_gguf(folder, capsys, tiny_state):
    torch.save({f"blocks.{i}.att.time_state": torch.zeros(4, 16, 16) for i in range(2)}, folder / "state.pth")
    assert "time states of 2 layers, (heads, N, N) = (4, 16, 16)" in inspect(capsys, folder / "state.pth")
    torch.save({"model.x": torch.ones(3), "y": torch.ones(2, 2).half()}, folder / "foreign.pth")
    out = inspect(capsys, folder / "foreign.pth")
    assert "foreign" in out and "float32 (3), float16 (4)" in out and "not read" in out
    pytest.importorskip("gguf")
    convert(folder, "base.pth", "m.gguf", "--gguf_type", "q8_0")
    out = inspect(capsys, folder / "m.gguf")
    assert "kind  GGUF\n" in out and "bytes; gguf-dump of the gguf package prints its header" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (("absent.pth",), "does not exist"),
        (("empty.st",), "holds no tensor"),
        (("broken.gguf",), "broken.gguf is no GGUF"),
        (("gone.gguf",), "gone.gguf does not exist; check the name"),
    ],
)
def test_what_is_no_such_file_is_refused(folder, words, message):
    save_file({}, folder / "empty.st")
    (folder / "broken.gguf").write_bytes(b"GGF")
    with pytest.raises(UserError, match=message):
        main(["inspect", *(str(folder / word) for word in words)])


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
    assert push([str(folder), "me/mine", "--private", "--message", "First"]) == 0
    assert "pushed     2 files to https://hub/me/mine/commit/1" in capsys.readouterr().out
    assert sorted(hub.stored) == ["README.md", "adapter.safetensors"]  # config.json names folders of this machine
    assert hub.stored["adapter.safetensors"] == adapter_file.read_bytes() and hub.messages == ["First"]
    assert b"--bone_checkpoint adapter.safetensors" in hub.stored["README.md"] and hub.made == {"me/mine": True}
    for hub.token, message in (
        ("hf_wrong", "me/mine was not pushed to https://hub"),
        (None, "run `hf auth login` first"),
    ):
        with pytest.raises(UserError, match=message):
            push([str(folder), "me/mine"])


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
        push([str(adapter_file.parent), "me/mine", "--dry_run"])


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
        assert push([str(folder), "me/mine"]) == 0
        assert (
            pushed["README.md"] == folder / "README.md" if written else b"`adapter.safetensors`:" in pushed["README.md"]
        )
