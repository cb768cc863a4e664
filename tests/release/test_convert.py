"""Conversions: round trips are bitwise, layouts are those of each format, nothing is lost silently."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from release.conversions import convert, same
from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.checkpoints.tensors import TensorSpec, write_safetensors
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models import family_named
from rwkv_peft.models.rwkv6.formats import from_hf, from_web, to_hf, to_web
from rwkv_peft.release.convert import read_model


def test_names_of_other_formats_are_undone(tiny_state):
    for key in [*tiny_state(), "blocks.1.att.time_state"]:
        assert from_hf(to_hf(key)) == key and from_web(to_web(key)) == key
    assert to_web("blocks.0.att.time_faaaa") == "blocks.0.att.time_first"
    assert to_web("blocks.0.ffn.time_maa_k") == "blocks.0.ffn.time_mix_k"
    assert to_hf("blocks.0.ln0.weight") == "rwkv.blocks.0.pre_ln.weight" and to_hf("head.weight") == "head.weight"
    assert to_hf("emb.weight") == "rwkv.embeddings.weight"


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


def test_8_bit_floats_are_refused(tmp_path):
    save_file({"head.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="m.safetensors: head.weight is float8_e4m3fn"):
        convert(tmp_path / "m.safetensors", tmp_path / "m.pth")


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


def test_a_lora_export_tells_its_alpha_and_a_pissa_export_its_init_file(tmp_path, capsys):
    factors = {"blocks.0.att.key.lora_A": torch.randn(4, 64), "blocks.0.att.key.lora_B": torch.randn(64, 4)}
    initial = {key.replace(".lora_", ".init_lora_"): tensor for key, tensor in factors.items()}
    for variant, tensors, words in (
        ("lora", factors, "it is 6; give it"),
        ("olora", factors | initial, "init_olora.pth as the init file"),
    ):
        save_adapter(tmp_path / "a.safetensors", tensors, AdapterMetadata(variant, rank=4, scale=1.5))
        convert(tmp_path / "a.safetensors", tmp_path / f"{variant}.pth")
        assert words in capsys.readouterr().out


def test_an_export_tells_the_quantization_that_it_cannot_record(tmp_path, capsys):
    for quant, words in (("nf4", "merge it with merge_bone.py --quant nf4"), ("none", "")):
        metadata = AdapterMetadata("bone", rank=4, quant=quant)
        save_adapter(tmp_path / "a.safetensors", {"blocks.0.att.key.bone": torch.ones(4, 32)}, metadata)
        convert(tmp_path / "a.safetensors", tmp_path / "a.pth")
        told = capsys.readouterr().out
        assert words in told and ("--quant" in told) == bool(words)


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


LORA = {"lora_A": torch.ones(8, 64), "lora_B": torch.ones(64, 8)}


@pytest.mark.parametrize("target", ["x.pth", "x.safetensors", "x.st", "x.gguf"])
@pytest.mark.parametrize("tensors", [{"bone": torch.ones(8, 64)}, {"disha": torch.ones(8, 64)}, LORA])
def test_a_model_beside_an_unmerged_adapter_is_refused(tmp_path, model, target, tensors):
    path, state = model
    torch.save(state | {f"blocks.0.att.key.{name}": tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(UserError, match="never merged.*merge_bone.py"):
        convert(path, tmp_path / target, "--lora_alpha", 8)
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
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path, model, source, target, message):
    (tmp_path / "junk.st").write_bytes(b"junk")
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
