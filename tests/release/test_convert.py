"""Conversions: round trips are bitwise, layouts are those of each format, nothing is lost silently; folders, also in
flash-linear-attention's layout, are written as a whole, and refused if they hold or are another layout."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from release.merges import convert, same
from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.base import base_of, open_base, save_model
from rwkv_peft.checkpoints.tensors import TensorSpec, write_safetensors
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.inference.command import main as generate
from rwkv_peft.models import family_named
from rwkv_peft.models.rwkv6.formats import to_hf
from rwkv_peft.release.convert import read_model
from rwkv_peft.release.formats import write_gguf
from rwkv_peft.release.inspect import main as inspect
from rwkv_peft.release.vocabulary import gguf_vocabulary


@pytest.mark.parametrize("name", ["there.st", "there.safetensors", "there"])
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_tensors_and_the_order_of_their_keys_come_back(tmp_path, version, name):
    """Released models and RWKV-LM's own have different orders; from a file sorted by name comes RWKV-LM's."""
    family = family_named(version)
    config = family.new_dimensions(n_layer=2, n_embd=64, vocab_size=257)
    official = {key: torch.randn(shape).half() for key, shape in family.shapes(config).items()}
    emb, *blocks, head = official
    keys = (emb, *sorted(blocks, key=lambda key: (key.split(".")[:2], -len(key))), head)
    released = {key: official[key] for key in keys}
    for state in (official, released):
        save_model(tmp_path / "model.pth", state)
        convert(tmp_path / "model.pth", tmp_path / name)
        convert(tmp_path / name, tmp_path / "back.pth")
        assert same(open_base(tmp_path / "back.pth").tensors, state)
    file = tmp_path / name / "model.safetensors" if name == "there" else tmp_path / name
    save_file(load_file(file), file)
    assert list(read_model(tmp_path / name)) == list(official)


@pytest.mark.parametrize("prefix", ["model.", "base_model.model."])
def test_the_prefix_of_a_wrapper_is_taken_off(tmp_path, model, prefix):
    path, state = model
    save_model(tmp_path / "wrapped.pth", {prefix + key: tensor for key, tensor in state.items()})
    with pytest.raises(UserError, match=r"keys start with .*`rwkv-peft convert \S+ model.pth` removes it"):
        open_base(tmp_path / "wrapped.pth")
    convert(tmp_path / "wrapped.pth", tmp_path / "plain.pth")
    assert same(open_base(tmp_path / "plain.pth").tensors, state)


@pytest.mark.parametrize("name", ["m.st", "hf", "m.gguf"])
def test_an_interrupt_leaves_nothing(tmp_path, model, name, request):
    path, _ = model
    request.getfixturevalue("ctrl_c_while_writing")
    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "new" / name)
    assert os.listdir(tmp_path) == [path.name]


def test_safetensors_has_the_layout_of_web_rwkv(tmp_path, model):
    path, state = model
    convert(path, tmp_path / "m.st")
    with safe_open(tmp_path / "m.st", framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
        for official, other in (("time_maa_w1", "time_mix_w1"), ("time_maa_w2", "time_mix_w2"), ("time_decay_w1",) * 2):
            expected = state[f"blocks.1.att.{official}"].transpose(-1, -2).half()
            assert torch.equal(file.get_tensor(f"blocks.1.att.{other}"), expected)
        assert torch.equal(file.get_tensor("blocks.0.att.time_first"), state["blocks.0.att.time_faaaa"].half())
        assert torch.equal(file.get_tensor("blocks.0.att.key.weight"), state["blocks.0.att.key.weight"].half())


def test_a_streamed_safetensors_is_read_by_its_library(tmp_path):
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3).half(), "t": torch.randn(4, 2).bfloat16().T}
    specs = {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}
    write_safetensors(tmp_path / "s", specs, tensors.items(), {"note": "x"})
    with safe_open(tmp_path / "s", framework="pt") as file:
        assert file.metadata() == {"note": "x"}
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in tensors.items())


def test_values_that_the_target_cannot_hold_are_refused(tmp_path, tiny_state):
    state = tiny_state()
    state["head.weight"][3, 3] = 1e6
    save_model(tmp_path / "model.pth", state)
    with pytest.raises(UserError, match="head.weight holds NaN, Inf or values beyond torch.float16"):
        convert(tmp_path / "model.pth", tmp_path / "m.st")
    assert os.listdir(tmp_path) == ["model.pth"]


def test_time_states_swap_both_ways(tmp_path):
    states = {f"blocks.{i}.att.time_state": torch.randn(2, 8, 8) for i in range(3)}
    save_model(tmp_path / "s.pth", states)
    convert(tmp_path / "s.pth", tmp_path / "s.state")
    with safe_open(tmp_path / "s.state", framework="pt") as file:
        assert torch.equal(file.get_tensor("blocks.2.att.time_state"), states["blocks.2.att.time_state"].mT)
    convert(tmp_path / "s.state", tmp_path / "back.pth")
    assert same(dict(sorted(torch.load(tmp_path / "back.pth", weights_only=True).items())), states)


@pytest.mark.parametrize(
    "output, finds", [("m.pth", True), ("m.st", False), ("m.safetensors", False), ("folder", False)]
)
def test_states_that_go_along_unseen_are_told(tmp_path, model, capsys, output, finds):
    path, state = model
    states = {f"blocks.{i}.att.time_state": torch.randn(4, 16, 16).bfloat16() for i in range(2)}
    save_model(path, state | states)
    convert(path, tmp_path / "out" / output)
    told = "holds tuned states, and its runtimes take those only as a separate file" in capsys.readouterr().out
    assert told == (not finds)
    convert(tmp_path / "out" / output, tmp_path / "back.pth", "--dtype", "bf16")
    found = open_base(tmp_path / "back.pth").tensors
    assert all(torch.allclose(found[key], states[key], rtol=1e-2) for key in states)


@pytest.mark.parametrize(
    "states, message",
    [
        ({0: torch.zeros(2, 8, 8), 2: torch.zeros(2, 8, 8)}, "2 time states and no blocks.1.att.time_state"),
        ({0: torch.zeros(2, 8, 8), 1: torch.zeros(2, 4, 4)}, r"blocks.1.att.time_state has shape \(2, 4, 4\)"),
        ({0: torch.zeros(2, 4, 8)}, "head size, head size"),
        ({0: torch.zeros(8, 8)}, "head size, head size"),
        ({0: torch.tensor(0.0)}, "head size, head size"),
        ({0: torch.zeros(2, 8, 8, dtype=torch.int64)}, "is int64; weights must be dense tensors of bfloat16"),
    ],
)
def test_time_states_that_fit_no_model_are_refused(tmp_path, states, message):
    torch.save({f"blocks.{i}.att.time_state": tensor for i, tensor in states.items()}, tmp_path / "s.pth")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "s.pth", tmp_path / "s.st")
    assert os.listdir(tmp_path) == ["s.pth"]


def test_a_file_without_tensors_is_refused(tmp_path):
    write_safetensors(tmp_path / "none.safetensors", {}, [])
    with pytest.raises(UserError, match="none.safetensors holds no tensor"):
        convert(tmp_path / "none.safetensors", tmp_path / "x.pth")


def test_adapters_go_to_rwkv_peft_and_back(tmp_path):
    tensors = {"blocks.0.att.key.bone": torch.randn(4, 16, 16)}
    save_adapter(tmp_path / "a.safetensors", tensors, AdapterMetadata("bat-in", rank=16))
    convert(tmp_path / "a.safetensors", tmp_path / "flat.pth")
    assert list(torch.load(tmp_path / "flat.pth", weights_only=True)) == ["blocks.0.att.key.disha"]
    convert(tmp_path / "flat.pth", tmp_path / "back.safetensors")
    back = read_adapter(tmp_path / "back.safetensors")
    assert back.metadata.variant == "bat-in" and same(back.tensors, tensors)
    convert(tmp_path / "a.safetensors", tmp_path / "old.pth", "--bone_parameter", "bone")
    with pytest.raises(UserError, match="--bone_mode"):
        convert(tmp_path / "old.pth", tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="cannot hold"):
        convert(tmp_path / "a.safetensors", tmp_path / "a.gguf")


@pytest.mark.parametrize(
    "variant, names, quant, words",
    [
        ("lora", "lora_A lora_B", "none", "it is 6; give it"),
        ("olora", "lora_A lora_B init_lora_A init_lora_B", "none", "init_flat.pth as the init file"),
        ("bone", "bone", "nf4", "merge it with merge_bone.py --quant nf4"),
    ],
)
def test_an_export_tells_what_it_cannot_record(tmp_path, capsys, variant, names, quant, words):
    shapes = {"lora_A": (4, 64), "lora_B": (64, 4), "bone": (4, 64)}
    tensors = {f"blocks.0.att.key.{name}": torch.randn(shapes[name.removeprefix("init_")]) for name in names.split()}
    save_adapter(tmp_path / "a.safetensors", tensors, AdapterMetadata(variant, rank=4, scale=1.5, quant=quant))
    convert(tmp_path / "a.safetensors", tmp_path / "flat.pth")
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    "source, flag, output",
    [
        ("flat.pth", "--base_model", "model.pth"),
        ("flat.pth", "--base_model", "link.pth"),
        ("pissa.pth", "--lora_init", "init.pth"),
        ("hf/model.safetensors", None, "hf"),
        ("hf", None, "hf/model.safetensors"),
    ],
)
def test_no_input_is_overwritten(tmp_path, model, source, flag, output):
    path, _ = model
    (tmp_path / "link.pth").symlink_to(path)
    convert(path, tmp_path / "hf")
    torch.save({"blocks.0.att.key.bone": torch.randn(4, 16, 16)}, tmp_path / "flat.pth")
    factors = {"lora_A": torch.randn(4, 64), "lora_B": torch.randn(64, 4)}
    torch.save({f"blocks.0.att.key.{name}": tensor for name, tensor in factors.items()}, tmp_path / "pissa.pth")
    torch.save({f"blocks.0.att.key.init_{name}": tensor for name, tensor in factors.items()}, tmp_path / "init.pth")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=f"is the file given as {flag or 'the input'}"):
        convert(tmp_path / source, tmp_path / output, *((flag, tmp_path / output) if flag else ()))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("target", ["x.pth", "x.safetensors", "x.st", "x.gguf"])
def test_a_model_beside_an_unmerged_adapter_is_refused(tmp_path, model, target):
    path, state = model
    torch.save(state | {"blocks.0.att.key.disha": torch.ones(8, 64)}, path)
    with pytest.raises(UserError, match="never merged.*merge_bone.py"):
        convert(path, tmp_path / target)
    assert os.listdir(tmp_path) == ["model.pth"]


@pytest.mark.parametrize(
    "source, target, message",
    [
        ("model.gguf", "x.pth", "written here and not read"),
        ("square.pth", "x.safetensors", "give --base_model, whose layers' shapes may decide it, or --bone_mode"),
        ("model.pth", "junk.st/x.st", "a file stands where"),
        ("none.pth", "x.st", "does not exist"),
        ("model.pth", "model.pth", "given as the input, which must not be overwritten"),
        ("model.pth", "x.bin", "names no format"),
        ("junk.st", "x.pth", "not a readable safetensors"),
        ("empty", "x.pth", "without .safetensors files"),
        ("hf", "x.pth", "config.json is not JSON"),
        ("tuned.pth", "x.gguf", "no place for initial states"),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path, model, source, target, message):
    (tmp_path / "junk.st").write_bytes(b"junk")
    convert(model[0], tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("{")
    states = {f"blocks.{i}.att.time_state": torch.zeros(4, 16, 16) for i in range(2)}
    save_model(tmp_path / "tuned.pth", model[1] | states)
    (tmp_path / "empty").mkdir()
    torch.save({"blocks.0.ffn.key.bone": torch.randn(4, 16, 16)}, tmp_path / "square.pth")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / source, tmp_path / target)


@pytest.mark.parametrize(
    "source, target, flag, value, why",
    [
        ("model.pth", "x.gguf", "--dtype", "bf16", "the type of a GGUF is --gguf_type's"),
        ("adapter.safetensors", "x.pth", "--dtype", "fp16", "an adapter's tensors keep their dtypes"),
        ("model.pth", "x.st", "--gguf_type", "q8_0", "for a model's .gguf"),
        ("adapter.safetensors", "x.gguf", "--gguf_type", "q8_0", "for a model's .gguf"),
        ("model.pth", "x.st", "--tokenizer", "bytes", "into a model's .gguf or folder"),
        ("model.pth", "x.st", "--bone_parameter", "bone", "for an adapter's .pth"),
        ("adapter.safetensors", "x.safetensors", "--bone_parameter", "bone", "for an adapter's .pth"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(tmp_path, model, source, target, flag, value, why):
    tensors = {"blocks.0.att.key.bone": torch.ones(4, 32)}
    save_adapter(tmp_path / "adapter.safetensors", tensors, AdapterMetadata("bone", rank=4))
    with pytest.raises(UserError, match=f"{flag} {value} would change nothing of .*{target}: .*{why}"):
        convert(tmp_path / source, tmp_path / target, flag, value)
    assert not (tmp_path / target).exists()


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


DEMOS = Path(__file__).resolve().parents[2] / "demo"


@pytest.mark.parametrize("name", ["rwkv6-demo.pth", "rwkv7-demo.pth"])
def test_a_folder_is_the_model_that_it_was_made_of(tmp_path, name, capsys):
    """Both demos, to the bit and in order, through a folder and back, and as --model."""
    base = open_base(DEMOS / name)
    convert(DEMOS / name, tmp_path / "hf", "--tokenizer", "bytes")
    opened = open_base(tmp_path / "hf")
    assert opened.fingerprint == base.fingerprint and opened.config == base.config
    assert all(torch.equal(opened.tensors[key], tensor) for key, tensor in base.tensors.items())
    convert(tmp_path / "hf", tmp_path / "back.pth")
    convert(DEMOS / name, tmp_path / "copy.pth")
    back, copy = (torch.load(tmp_path / file, weights_only=True) for file in ("back.pth", "copy.pth"))
    assert back.keys() == copy.keys() and all(torch.equal(back[key], copy[key]) for key in back)
    asked = ("--prompt", "Q: 2 and 2?", "--temperature", "0", "--max_tokens", "6", "--seed", "1", "--precision", "fp32")
    capsys.readouterr()
    answers = []
    for model in (DEMOS / name, tmp_path / "hf"):
        assert generate(["--model", str(model), *asked]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


def test_the_folder_has_the_names_and_settings_of_transformers_rwkv7(tmp_path, state):
    """Pull request #47787: official keys behind `rwkv7.`, zeros for the value residual that layer 0 lacks."""
    torch.save(state, tmp_path / "m.pth")
    convert(tmp_path / "m.pth", tmp_path / "hf", "--dtype", "keep")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    first = {f"rwkv7.blocks.0.att.v{i}": torch.zeros_like(state[f"blocks.1.att.v{i}"]) for i in range(3)}
    due = {key if key == "head.weight" else f"rwkv7.{key}": tensor for key, tensor in state.items()} | first
    assert written.keys() == due.keys() and all(torch.equal(written[key], due[key]) for key in due)
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    sizes = {"head_dim": 64, "num_heads": 2, "norm_eps": 1e-5, "hidden_size": CHANNELS, "intermediate_size": 192}
    assert settings.items() >= (sizes | {"model_type": "rwkv7", "num_hidden_layers": LAYERS}).items()
    assert settings["max_position_embeddings"] > 0 and settings["architectures"] == ["Rwkv7ForCausalLM"]
    convert(tmp_path / "hf", tmp_path / "back.pth", "--dtype", "keep")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), state)


def in_qwen_names(state):
    """{key: tensor} as transformers-rwkv's converter (temp/rwkv_pth2st.py) names and shapes an official state dict."""
    names = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm", "att": "linear_attn", "ffn": "mlp"}
    projections = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "ln_x": "g_norm"}
    ends = {"emb": "model.embed_tokens", "ln_out": "model.norm", "head": "lm_head"}
    found = {}
    for key, tensor in state.items():
        first, *rest = key.split(".")
        if first in ends:
            there = [ends[first], *rest]
        elif rest[1] == "ln0":
            there = ["model.embedding_norm", rest[2]]
        else:
            leaf = projections.get(rest[2], rest[2]) if rest[1] == "att" else rest[2]
            there = ["model.layers", rest[0], names[rest[1]], leaf, *rest[3:]]
        found[".".join(there)] = tensor.flatten() if tensor.ndim == 3 else tensor
    return found


RWKV_RS = {"model_type": "rwkv", "architecture_version": "rwkv7", "head_size": 64, "group_norm_epsilon": 64e-5}


def test_a_folder_of_transformers_rwkv_is_read(tmp_path, state):
    for name, tensors in (
        ("later", in_qwen_names(state)),
        ("first", {key if key == "head.weight" else f"model.{key}": tensor for key, tensor in state.items()}),
    ):
        convert(write(tmp_path / name, tensors, RWKV_RS), tmp_path / f"{name}.pth", "--dtype", "keep")
        assert same(torch.load(tmp_path / f"{name}.pth", weights_only=True), state)
    fused = {key: tensor for key, tensor in in_qwen_names(state).items() if "embedding_norm" not in key}
    for name, tensors, settings, message in (
        ("fused", fused, {"embedding_layer_norm_fused": True}, "embedding_layer_norm_fused is True, and it is False"),
        ("four", in_qwen_names(state), {"architecture_version": "rwkv4"}, "architecture_version is rwkv4"),
        ("odd", in_qwen_names(state) | {"model.layers.0.mlp.gate.weight": state["head.weight"]}, {}, "ffn.gate.weight"),
    ):
        with pytest.raises(UserError, match=message):
            convert(write(tmp_path / name, tensors, RWKV_RS | settings), tmp_path / "none.pth")
    assert not (tmp_path / "none.pth").exists()


def test_heads_that_transformers_norms_otherwise_are_refused(tmp_path, state):
    """Its eps is head size x norm_eps; a folder of ours says in group_norm_epsilon that it has RWKV-7's."""
    heads = {key: tensor.view(4, 32) if key.endswith("r_k") else tensor for key, tensor in state.items()}
    torch.save(heads, tmp_path / "m.pth")
    convert(tmp_path / "m.pth", tmp_path / "hf", "--dtype", "keep")
    assert open_base(tmp_path / "hf").config.head_size == 32
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    del settings["group_norm_epsilon"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="head_dim is 32, and heads of 64 are due"):
        open_base(tmp_path / "hf")
