"""Folders in flash-linear-attention's layout of RWKV-7: every tensor is converted exactly, and other models are
refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from release.conversions import convert, same
from rwkv_peft.checkpoints.base import open_base
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models import family_named
from rwkv_peft.release.inspect import main as inspect

LAYERS, CHANNELS = 3, 128
NORMS = {"attn": "ln1", "ffn": "ln2"}
SETTINGS = {"model_type": "rwkv7", "head_dim": 64, "hidden_act": "sqrelu", "norm_eps": 1e-05, "attn": None}


@pytest.fixture
def state():
    """A bfloat16 state dict under official keys, its r_k in float32, its layer 0 without the value residual."""
    family = family_named("x070")
    config = family.new_dimensions(n_layer=LAYERS, n_embd=CHANNELS, vocab_size=257, dim_ffn=192)
    draw = torch.Generator().manual_seed(0)
    made = {key: torch.randn(shape, generator=draw).bfloat16() for key, shape in family.shapes(config).items()}
    made = {key: tensor.float() if key.endswith("r_k") else tensor for key, tensor in made.items()}
    return {key: tensor for key, tensor in made.items() if not key.startswith("blocks.0.att.v") or "value" in key}


def in_fla(state, value_in_first=False):
    """{key: tensor} as flash-linear-attention's RWKV7ForCausalLM has the model of an official state dict."""
    found = {
        "model.embeddings.weight": state["emb.weight"],
        "model.layers.0.pre_norm.weight": state["blocks.0.ln0.weight"],
        "model.layers.0.pre_norm.bias": state["blocks.0.ln0.bias"],
    }
    for i in range(LAYERS):
        there, here = f"model.layers.{i}.", f"blocks.{i}."
        projections = {"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output", "g_norm": "ln_x"}
        names = {f"attn.{name}.weight": f"att.{official}.weight" for name, official in projections.items()}
        names |= {f"{norm}_norm.{part}": f"{ln}.{part}" for norm, ln in NORMS.items() for part in ("weight", "bias")}
        names |= {f"attn.{name}": f"att.{name}" for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "r_k")}
        names |= {"attn.g_norm.bias": "att.ln_x.bias", "ffn.key.weight": "ffn.key.weight"}
        names |= {"ffn.value.weight": "ffn.value.weight"}
        found |= {there + name: state[here + official] for name, official in names.items()}
        for name in ("att.k_k", "att.k_a", "ffn.x_k"):
            found[there + name.replace("att.", "attn.")] = state[here + name].flatten()
        for name in "wvag" if i > 0 or value_in_first else "wag":
            for number, layer in ((1, 0), (2, 2)):
                low_rank = state[f"{here}att.{name}{number}"].T.contiguous()
                found[f"{there}attn.{name}_lora.lora.{layer}.weight"] = low_rank
            if name != "g":
                found[f"{there}attn.{name}_lora.lora.2.bias"] = state[f"{here}att.{name}0"].flatten()
    found["model.norm.weight"] = state["ln_out.weight"]
    found["model.norm.bias"] = state["ln_out.bias"]
    found["lm_head.weight"] = state["head.weight"]
    return found


def stacked(tensors, axes):
    """The same as older versions saved it: a layer's token-shift amounts in one tensor, with `axes` dimensions."""
    found = {key: tensor for key, tensor in tensors.items() if ".attn.x_" not in key}
    for i in range(LAYERS):
        rows = [tensors[f"model.layers.{i}.attn.x_{name}"] for name in ("r", "w", "k", "v", "a", "g")]
        found[f"model.layers.{i}.attn.x_x"] = torch.stack([row.flatten() for row in rows]).view(6, *axes)
    return found


def write(folder, tensors, settings=None):
    """Write a folder of two shards, with `settings` besides SETTINGS."""
    folder.mkdir()
    keys = list(tensors)
    for number, part in enumerate((keys[::2], keys[1::2])):
        save_file({key: tensors[key] for key in part}, folder / f"model-0000{number + 1}-of-00002.safetensors")
    (folder / "config.json").write_text(json.dumps(SETTINGS | (settings or {})))
    return folder


@pytest.mark.parametrize("axes", [None, (CHANNELS,), (1, 1, CHANNELS)], ids=["six", "stacked", "stacked-4d"])
def test_every_tensor_is_the_official_one_in_the_official_order(tmp_path, state, axes, capsys):
    folder = write(tmp_path / "hf", in_fla(state) if axes is None else stacked(in_fla(state), axes))
    convert(folder, tmp_path / "m.pth")
    assert same(torch.load(tmp_path / "m.pth", weights_only=True), state)
    assert same(open_base(tmp_path / "m.pth").tensors, state)
    capsys.readouterr()
    assert inspect([str(folder)]) == 0
    assert "model, RWKV-7 (x070)" in capsys.readouterr().out


def test_a_value_residual_of_layer_0_is_kept(tmp_path, state):
    official = {}
    for key, tensor in state.items():
        official[key] = tensor
        if key == "blocks.0.att.a0":  # behind which the others have theirs
            official |= {f"blocks.0.att.v{i}": state[f"blocks.1.att.v{i}"] + 1 for i in (1, 2, 0)}
    convert(write(tmp_path / "hf", in_fla(official, value_in_first=True)), tmp_path / "m.pth")
    assert same(open_base(tmp_path / "m.pth").tensors, official)


def test_a_folder_is_written_as_it_is_read(tmp_path, state, capsys):
    """Without the value residual of layer 0, which those models do not have and none computes."""
    value = {f"blocks.0.att.v{i}": state[f"blocks.1.att.v{i}"] for i in range(3)}
    torch.save(state | value, tmp_path / "m.pth")
    convert(tmp_path / "m.pth", tmp_path / "hf", "--to", "fla")
    assert f"{len(state)} tensors, bfloat16 and float32, vocabulary bytes; flash-linear" in capsys.readouterr().out
    written = load_file(tmp_path / "hf" / "model.safetensors")
    expected = in_fla(state)
    assert set(written) == set(expected) and all(torch.equal(written[key], expected[key]) for key in written)
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings.items() >= (SETTINGS | {"hidden_size": CHANNELS, "num_heads": 2, "intermediate_size": 192}).items()
    assert settings["eos_token_id"] == 0 and settings["value_dim"] == [CHANNELS] * LAYERS
    convert(tmp_path / "hf", tmp_path / "back.pth")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), state)


def test_what_has_no_such_folder_is_refused(tmp_path, state, tiny_state):
    torch.save(tiny_state(vocab_size=257), tmp_path / "six.pth")
    heads = {key: tensor.view(4, 32) if key.endswith("r_k") else tensor for key, tensor in state.items()}
    torch.save(heads, tmp_path / "heads.pth")
    torch.save({"blocks.0.att.key.bone": torch.zeros(8, 128)}, tmp_path / "adapter.pth")
    for name, target, message in (
        ("six", "hf", "RWKV-6 has no form as flash-linear-attention's folder"),
        ("heads", "hf", "heads of 32, and flash-linear-attention computes RWKV-7 only with heads of 64"),
        ("adapter", "hf", "holds an adapter, and only models convert to fla"),
        ("heads", "m.gguf", "--to fla writes a folder, and .*m.gguf names a .gguf file"),
    ):
        with pytest.raises(UserError, match=message):
            convert(tmp_path / f"{name}.pth", tmp_path / target, "--to", "fla")
        assert not (tmp_path / target).exists()


def test_each_missing_tensor_is_named_as_the_folder_has_it(tmp_path, state):
    tensors = in_fla(state)
    for number, key in enumerate(tensors):
        folder = write(tmp_path / str(number), {name: tensor for name, tensor in tensors.items() if name != key})
        with pytest.raises(UserError, match=rf"flash-linear-attention: 1 missing tensors \({key}\); take the folder"):
            convert(folder, tmp_path / "m.pth")
    assert not (tmp_path / "m.pth").exists()


@pytest.mark.parametrize(
    "key, shape, message",
    [
        ("model.layers.1.attn.r_proj.bias", (128,), r"1 unexpected tensors \(model.layers.1.attn.r_proj.bias\)"),
        ("model.layers.0.attn.x_x", (6, 128), r"1 unexpected tensors \(model.layers.0.attn.x_x\)"),
        ("model.layers.0.attn.v_lora.lora.2.bias", (128,), "2 missing tensors .model.layers.0.attn.v_lora.lora.0"),
        ("model.layers.987654321.ffn.x_k", (128,), r"missing .*unexpected tensors \(model.layers.987654321.ffn.x_k\)"),
        ("emb.weight", (257, 128), r"1 unexpected tensors \(emb.weight\)"),
        ("model.layers.1.attn.w_lora.lora.0.weight", (8, 128), r"blocks.1.att.w1 has shape \(128, 8\), and"),
        ("model.layers.1.attn.a_lora.lora.2.weight", (128,), r"blocks.1.att.a2 has shape \(128,\), and"),
        ("model.layers.2.attn.k_k", (1, 128), r"blocks.2.att.k_k has shape \(1, 128\), and \(1, 1, 128\) is due"),
        ("model.layers.2.ffn.x_k", (64,), r"blocks.2.ffn.x_k has shape \(1, 1, 64\), and"),
        ("model.layers.2.attn.r_k", (4, 32), r"layers.2.attn.r_k has shape \(4, 32\), and heads of 64 are due"),
        ("model.layers.2.attn.r_k", (), r"layers.2.attn.r_k has shape \(\), and heads of 64 are due"),
    ],
)
def test_what_is_no_such_model_is_refused(tmp_path, state, key, shape, message):
    folder = write(tmp_path / "hf", in_fla(state) | {key: torch.zeros(shape).bfloat16()})
    with pytest.raises(UserError, match=message):
        convert(folder, tmp_path / "m.pth")
    assert not (tmp_path / "m.pth").exists()


@pytest.mark.parametrize(
    "settings, due",
    [
        ({"norm_eps": 1e-6}, "1e-05"),
        ({"norm_eps": "small"}, "1e-05"),
        ({"hidden_act": "relu"}, "sqrelu"),
        ({"tie_word_embeddings": True}, "False"),
        ({"attn": {"layers": [1]}}, "None"),
    ],
)
def test_settings_of_another_computation_are_refused(tmp_path, state, settings, due):
    folder = write(tmp_path / "hf", in_fla(state), settings)
    with pytest.raises(UserError, match=f"config.json: {next(iter(settings))} is .*it is {due} in RWKV-7"):
        convert(folder, tmp_path / "m.pth")


def test_where_a_pth_is_due_the_command_is_named(tmp_path, state):
    folder = write(tmp_path / "hf", in_fla(state))
    with pytest.raises(UserError, match=r"is a Hugging Face folder.*`rwkv-peft convert \S+hf model.pth`"):
        open_base(folder)
    with pytest.raises(UserError, match="give the whole folder of one in flash-linear-attention's layout"):
        convert(folder / "model-00001-of-00002.safetensors", tmp_path / "m.pth")
