"""`rwkv-peft inspect`: every kind of file is named correctly, and the changes shown are those that were made."""

import json

import pytest
import torch
from safetensors.torch import save_file

from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.base import base_of, save_model
from rwkv_peft.checkpoints.state_file import read_states
from rwkv_peft.checkpoints.tensors import TensorSpec
from rwkv_peft.cli.commands import main
from rwkv_peft.cli.errors import UserError
from rwkv_peft.release.changes import TensorChange, change_table


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


def test_a_saved_chat_is_said_to_be_a_session(folder, capsys):
    words = ["--model", str(folder / "base.pth"), "--prompt", "a", "--max_tokens", "1"]
    assert main(["generate", *words, "--save_state", str(folder / "chat.pth")]) == 0
    assert "session of 2 layers, which generate --state goes on from\n" in inspect(capsys, folder / "chat.pth")


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
    assert "GGUF model, rwkv6" in out and "q8_0" in out and "block_count 2" in out and "257 tokens" in out
    (folder / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="broken.gguf is no readable GGUF"):
        main(["inspect", str(folder / "broken.gguf")])
    with pytest.raises(UserError, match="gone.gguf does not exist; check the name"):
        main(["inspect", str(folder / "gone.gguf")])


def test_the_change_of_an_adapter_and_of_its_merged_model_is_told(folder, capsys):
    base, adapter = folder / "base.pth", folder / "bone.safetensors"
    weight = torch.load(base)["blocks.1.att.key.weight"].float()
    expected = 100 * float(torch.ones_like(weight).norm() / weight.norm())
    picture = folder / "heat.png"
    out = inspect(capsys, adapter, "--base_model", base, "--output", picture)
    rows = {line[:5].strip(): line.split()[1:] for line in out.splitlines()}
    assert rows["block"] == ["att.k", "others"] and rows["0"] == ["0"]  # of ln1, which stayed
    assert float(rows["1"][0]) == pytest.approx(expected, rel=0.05)
    assert picture.read_bytes().startswith(b"\x89PNG")
    words = ["--base_model", base, "--bone_checkpoint", adapter, "--output", folder / "merged.pth"]
    main(["merge", *map(str, words)])
    out = inspect(capsys, folder / "merged.pth", "--base_model", base)
    assert float(out.splitlines()[-1].split()[1]) == pytest.approx(expected, rel=0.05) and "\n    0 " not in out
    assert "none: it is the base" in inspect(capsys, base, "--base_model", base)


def test_states_that_one_of_two_models_lacks_are_a_change(folder, capsys):
    tensors = torch.load(folder / "base.pth")
    states = {f"blocks.{layer}.att.time_state": torch.full((4, 16, 16), float(layer)) for layer in range(2)}
    save_model(folder / "tuned.pth", tensors | states)
    out = inspect(capsys, folder / "tuned.pth", "--base_model", folder / "base.pth").partition("change of")[2]
    assert out.split()[-4:] == ["block", "others", "1", "inf"]
    out = inspect(capsys, folder / "base.pth", "--base_model", folder / "tuned.pth").partition("change of")[2]
    assert out.split()[-4:] == ["block", "others", "1", "100"]


def test_the_table_has_a_place_for_every_tensor():
    specs = {key: TensorSpec((4, 4), torch.float32) for key in ("blocks.0.att.key.weight", "blocks.0.ffn.value.weight")}
    changes = {"blocks.0.att.key.weight": 0.1, "blocks.2.ffn.value.weight": 0.2, "blocks.2.ln1.weight": 0.03}
    changes |= {"blocks.2.att.x_r": 0.04, "emb.weight": 0.05}
    lines = change_table([TensorChange(*change) for change in changes.items()], specs).splitlines()
    assert [line.split() for line in lines] == [
        ["block", "att.k", "ffn.v", "others"],
        ["0", "10"],
        ["2", "20", "4"],
        ["-", "5"],
    ]


@pytest.mark.parametrize("others", [0.0, 0.1])
def test_a_matrix_of_a_new_model_that_was_zero_is_told(folder, tmp_path, capsys, others):
    fresh = torch.load(folder / "base.pth") | {"blocks.0.att.output.weight": torch.zeros(64, 64)}
    moved = fresh | {"blocks.0.att.output.weight": torch.ones(64, 64)}
    moved["blocks.1.att.output.weight"] = (1 + others) * fresh["blocks.1.att.output.weight"]
    for name, state in (("fresh", fresh), ("moved", moved)):
        torch.save(state, tmp_path / f"{name}.pth")
    words = (tmp_path / "moved.pth", "--base_model", tmp_path / "fresh.pth", "--output", tmp_path / "heat.png")
    rows = [line.split() for line in inspect(capsys, *words).splitlines() if line.startswith("    ")]
    assert rows[0] == ["0", "inf"] and (rows[1:] == [["1", "10"]] if others else not rows[1:])


@pytest.mark.parametrize("others", [0.0, 0.1])
def test_a_matrix_with_nan_is_told(folder, tmp_path, capsys, others):
    """The picture shows it as white as an unchanged matrix."""
    state = torch.load(folder / "base.pth")
    state["blocks.0.att.output.weight"] = state["blocks.0.att.output.weight"].clone()
    state["blocks.0.att.output.weight"][3, 5] = float("nan")
    state["blocks.1.att.output.weight"] = (1 + others) * state["blocks.1.att.output.weight"]
    torch.save(state, tmp_path / "nan.pth")
    words = (tmp_path / "nan.pth", "--base_model", folder / "base.pth", "--output", tmp_path / "heat.png")
    lines = inspect(capsys, *words).splitlines()
    assert [line.split() for line in lines if line.startswith("    0 ")] == [["0", "nan"]]
    assert lines[-2].startswith("nan: the tensor or the base's holds NaN or Inf")
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, message",
    [
        (("absent.pth",), "does not exist"),
        (("empty.st",), "holds no tensor"),
        (("base.pth", "--output", "x.png"), "name the base"),
        (("bone.safetensors", "--base_model", "base.pth", "--output", "x.jpg"), "does not end in .png"),
        (("bone.safetensors", "--base_model", "other.pth"), "was trained on another base"),
        (("base.pth", "--base_model", "small.pth"), "has other dimensions"),
        (("state.pth", "--base_model", "base.pth"), "neither a model nor an adapter"),
        (("base.pth", "--base_model", "base.pth", "--output", "base.png/x.png"), "a file stands where"),
    ],
)
def test_what_does_not_belong_together_is_refused(folder, tiny_state, words, message):
    save_model(folder / "other.pth", tiny_state(vocab_size=257, seed=5))
    save_model(folder / "small.pth", tiny_state(n_layer=1))
    torch.save({"blocks.0.att.time_state": torch.zeros(4, 16, 16)}, folder / "state.pth")
    save_file({}, folder / "empty.st")
    (folder / "base.png").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        main(["inspect", *(str(folder / word) if "." in word else word for word in words)])
