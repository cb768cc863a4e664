"""Hugging Face folders and GGUF: there and back, written as a whole, and refused if they hold or are another layout."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from release.conversions import convert, same
from rwkv_peft.checkpoints.base import base_of, open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.models.rwkv6.formats import to_hf
from rwkv_peft.release.gguf import write_gguf
from rwkv_peft.release.vocabulary import gguf_vocabulary


def test_hugging_face_folder_there_and_back_is_bitwise(tmp_path, model):
    path, state = model
    convert(path, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "back.pth")
    assert same(open_base(tmp_path / "back.pth").tensors, state)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["hidden_size"], config["head_size"], config["intermediate_size"]) == (64, 16, 96)
    assert config["rescale_every"] == 0 and config["vocab_size"] == 257
    assert len(json.loads((tmp_path / "hf" / "tokenizer.json").read_bytes())["model"]["vocab"]) == 257


def test_a_folder_between_two_models_is_refused_and_a_failure_leaves_the_old_one(tmp_path, model, tiny_state):
    path, state = model
    convert(path, tmp_path / "hf", "--dtype", "keep", "--tokenizer", "bytes")
    before = {file.name: file.read_bytes() for file in (tmp_path / "hf").iterdir()}
    save_model(tmp_path / "large.pth", tiny_state(vocab_size=257) | {"ln_out.bias": torch.full((64,), 1e30)})
    with pytest.raises(UserError, match="choose another --dtype"):
        convert(tmp_path / "large.pth", tmp_path / "hf", "--dtype", "fp16", "--tokenizer", "bytes")
    assert {file.name: file.read_bytes() for file in (tmp_path / "hf").iterdir()} == before
    (tmp_path / "hf" / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json.* was interrupted"):
        convert(tmp_path / "hf", tmp_path / "back.pth")


@pytest.mark.parametrize("output, words", [("big/hf0.4b", ("--to", "hf")), ("hf0.4b/", ()), ("there.1", ()), ("x", ())])
def test_a_folder_may_have_a_dot_in_its_name(tmp_path, model, output, words):
    path, state = model
    (tmp_path / "there.1").mkdir()
    for _ in range(2):  # once more into the folder of an earlier conversion
        convert(path, f"{tmp_path}/{output}", *words)
    convert(tmp_path / output, tmp_path / "back.pth")
    assert same(open_base(tmp_path / "back.pth").tensors, state)


def test_a_file_that_is_named_where_a_folder_is_due_is_told(tmp_path, model):
    with pytest.raises(UserError, match="m.4b: its ending names no format .* for a folder of a model --to hf, a slash"):
        convert(model[0], tmp_path / "m.4b")
    with pytest.raises(UserError, match="--to hf writes a folder, and .*m.gguf names a .gguf file; leave that out"):
        convert(model[0], tmp_path / "m.gguf", "--to", "hf")


@pytest.mark.parametrize("output", ("run", "run/", "run.1"))
def test_a_folder_that_holds_something_else_is_left_as_it_is(tmp_path, model, output):
    run = tmp_path / output
    run.mkdir()
    for name in ("config.json", "adapter.safetensors", "loss.txt"):
        (run / name).write_text("mine")
    with pytest.raises(UserError, match="run.* holds adapter.safetensors, loss.txt, and no earlier conversion wrote"):
        convert(model[0], run)
    assert {path.read_text() for path in run.iterdir()} == {"mine"} and len(list(run.iterdir())) == 3


def test_shards_of_two_models_in_one_folder_are_refused(tmp_path, model):
    path, state = model
    convert(path, tmp_path / "hf")
    half = {to_hf(key): tensor for key, tensor in list(state.items())[::2]}
    save_file(half, tmp_path / "hf" / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="hf: model.safetensors and another of its .safetensors files both hold"):
        convert(tmp_path / "hf", tmp_path / "back.pth")
    save_file({to_hf(key): tensor for key, tensor in list(state.items())[1::2]}, tmp_path / "hf" / "model.safetensors")
    convert(tmp_path / "hf", tmp_path / "back.pth")
    assert same(dict(sorted(open_base(tmp_path / "back.pth").tensors.items())), dict(sorted(state.items())))


@pytest.mark.parametrize("output", ["m.pth", "m.st"])
def test_a_folder_of_another_model_is_not_sent_to_this_command_again(tmp_path, output):
    (tmp_path / "hf").mkdir()
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors = {"model.embeddings.weight": torch.zeros(4, 4), key: torch.zeros(4, 4)}
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text("{}")
    what = f"is a model of another kind .it has {key}., which is not read here; take the .pth that an RWKV model was"
    with pytest.raises(UserError, match=f"hf {what} released as$"):
        convert(tmp_path / "hf", tmp_path / output)
    torch.save(tensors, tmp_path / "hf.pth")
    with pytest.raises(UserError, match=f"hf.pth {what} released as, or give the whole folder"):
        convert(tmp_path / "hf.pth", tmp_path / output)


@pytest.mark.parametrize("text, message", [("{", "is not JSON"), ("[1]", "holds no settings, but a list")])
def test_a_folder_whose_settings_are_damaged_is_refused(tmp_path, model, text, message):
    convert(model[0], tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"config.json {message}.*; copy it again"):
        convert(tmp_path / "hf", tmp_path / "back.pth")


@pytest.mark.parametrize("kind, exact", [("f32", True), ("bf16", True), ("f16", False), ("q8_0", False)])
def test_gguf_holds_the_weights(tmp_path, tiny_state, kind, exact):
    gguf = pytest.importorskip("gguf")
    state = tiny_state(dtype=torch.bfloat16, vocab_size=260)
    write_gguf(tmp_path / "m.gguf", base_of(state), kind, gguf_vocabulary(BytesTokenizer(), 260))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    numbers = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    found = {name: torch.from_numpy(values.copy()) for name, values in numbers.items()}

    def check(name, expected, error):
        assert found[name].flatten().numel() == expected.numel()
        torch.testing.assert_close(found[name].reshape(expected.shape), expected.float(), rtol=error, atol=error)

    loose = 0 if exact else 2e-2
    check("blk.1.channel_mix_value.weight", state["blocks.1.ffn.value.weight"], loose)
    check("token_embd.weight", state["emb.weight"], loose)
    check("blk.0.time_mix_w1.weight", state["blocks.0.att.time_maa_w1"].T, 0)
    check("blk.0.time_mix_w2.weight", state["blocks.0.att.time_maa_w2"].permute(0, 2, 1), 0)
    check("blk.0.time_mix_lerp_fused.weight", torch.stack([state[f"blocks.0.att.time_maa_{x}"] for x in "wkvrg"]), 0)
    assert len(found) == len(state) - 4 * 2  # five lerps of each of two layers became one
    fields = reader.fields
    assert fields["rwkv6.rescale_every_n_layers"].contents() == 0
    assert fields["rwkv6.wkv.head_size"].contents() == 16
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 260


def test_gguf_refuses_time_states(tmp_path, tiny_state):
    pytest.importorskip("gguf")
    state = tiny_state(vocab_size=257)
    save_model(tmp_path / "m.pth", state | {f"blocks.{i}.att.time_state": torch.zeros(4, 16, 16) for i in range(2)})
    with pytest.raises(UserError, match="no place for initial states"):
        convert(tmp_path / "m.pth", tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == ["m.pth"]
