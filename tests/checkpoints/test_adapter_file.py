"""Adapter files and folders: they carry their own description, and a faulty or half-written one is refused."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rwkv_peft.adapters.inject import load_tensors
from rwkv_peft.checkpoints.adapter_file import ENTRY, METADATA_KEY, AdapterMetadata, Origin, save_adapter
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.peft_folder import CONFIG, TENSORS, is_adapter_folder, read_config, replacing
from rwkv_peft.checkpoints.tensors import read_safetensors
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import AdapterConfig

LAYER = "blocks.0.att.key"


def test_an_adapter_of_8_bit_floats_is_refused(tmp_path):
    block = torch.ones(4, 8, 8).to(torch.float8_e5m2)
    save_file({f"{LAYER}.bone": block}, tmp_path / "adapter.safetensors", {METADATA_KEY: "{}"})
    torch.save({f"{LAYER}.bone": block}, tmp_path / "adapter.pth")
    for name in ("adapter.safetensors", "adapter.pth"):
        with pytest.raises(UserError, match=f"{name}: {LAYER}.bone is float8_e5m2"):
            read_adapter(tmp_path / name, mode="bat-in")


def test_adapter_files_carry_what_they_are(tmp_path):
    tensors = {f"{LAYER}.bone": torch.randn(4, 16, 16), "blocks.0.ln1.weight": torch.randn(64).bfloat16()}
    metadata = AdapterMetadata.from_config(AdapterConfig(mode="bat-out", rank=16, train_parts=("ln",)), "abc")
    save_adapter(tmp_path / "a.safetensors", tensors, metadata)
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert adapter.metadata == metadata and metadata.variant == "bat-out" and metadata.base_fingerprint == "abc"
    assert set(adapter.tensors) == set(tensors) and all(
        torch.equal(adapter.tensors[key], tensors[key]) for key in tensors
    )
    assert set(adapter.modules()) == {LAYER} and set(adapter.whole()) == {"blocks.0.ln1.weight"}
    with pytest.raises(UserError, match="is a bat-out adapter, not bat-in"):
        read_adapter(tmp_path / "a.safetensors", mode="bat-in")


def test_what_a_file_tells_people_is_an_entry_that_it_may_lack(tmp_path):
    origin = Origin("base.pth", "world", "--data_type sft", "2e-05, cosine", "torch 2.13")
    metadata = AdapterMetadata("bone", rank=2, origin=origin)
    save_adapter(path := tmp_path / "a.safetensors", {f"{LAYER}.bone": torch.ones(2, 2)}, metadata)
    assert read_adapter(path).metadata == metadata
    odd = replace(metadata, origin=Origin("a\nb\udcff", data="x" * 2000))
    save_adapter(path, {f"{LAYER}.bone": torch.ones(2, 2)}, odd)
    assert read_adapter(path).metadata.origin == Origin("a?b?", data="x" * 1000)
    save_adapter(path, {f"{LAYER}.bone": torch.ones(2, 2)}, metadata)
    tensors, header = read_safetensors(path)
    assert "origin" not in json.loads(header["rwkv_peft"])  # which earlier versions would refuse
    assert json.loads(header.pop(ENTRY))["base"] == "base.pth"
    save_file(tensors, path, metadata=header)
    assert read_adapter(path).metadata == AdapterMetadata("bone", rank=2)
    save_file(tensors, path, metadata=header | {ENTRY: '{"later": 1, "rate": "1e-4"}'})
    assert read_adapter(path).metadata.origin == Origin(rate="1e-4")
    for damaged, base in (("{", ""), ("[]", ""), ('{"base": 1}', "1"), ('{"base": "\\u001b[2J"}', "?[2J")):
        save_file(tensors, path, metadata=header | {ENTRY: damaged})
        assert read_adapter(path).metadata.origin == Origin(base)


def test_equal_adapters_are_equal_files_in_any_order(tmp_path):
    tensors = {f"{LAYER}.bone": torch.randn(4, 16, 16), "blocks.0.ln1.weight": torch.randn(64).bfloat16()}
    metadata = AdapterMetadata("bat-in", rank=16, targets=("att.key",))
    for name, order in (("first", tensors), ("again", tensors), ("other", reversed(tensors.items()))):
        save_adapter(tmp_path / name, dict(order), metadata)
    first, again, other = ((tmp_path / name).read_bytes() for name in ("first", "again", "other"))
    assert first == again == other
    assert (int.from_bytes(first[:8], "little") + 8) % 8 == 0  # the data is aligned


@pytest.mark.parametrize(
    "variant, flags, words",
    [
        ("lora", {"alpha": 8.0}, None),
        ("lora", {"alpha": 128.0}, "--lora_alpha 128 contradicts .* trained with 8 "),
        ("lora", {"init": "init_pissa.pth"}, "--lora_init init_pissa.pth is for RWKV-PEFT's PiSSA files"),
        ("bone", {"alpha": 8.0}, "--lora_alpha 8 is LoRA's, and .* is a bone adapter"),
    ],
)
def test_lora_flags_must_agree_with_a_file_that_says_what_it_is(tmp_path, variant, flags, words):
    names = ("bone",) if variant == "bone" else ("lora_A", "lora_B")
    save_adapter(
        tmp_path / "a.safetensors",
        {f"blocks.0.att.key.{name}": torch.ones(4, 4) for name in names},
        AdapterMetadata(variant, rank=4, scale=2.0),
    )
    if words is None:
        assert read_adapter(tmp_path / "a.safetensors", **flags).metadata.scale == 2.0
    else:
        with pytest.raises(UserError, match=words):
            read_adapter(tmp_path / "a.safetensors", **flags)


def test_adapter_files_that_are_wrong_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="NaN"):
        save_adapter(path, {f"{LAYER}.bone": torch.full((2, 2), float("nan"))}, AdapterMetadata("bone", rank=2))
    assert not path.exists()
    path.write_bytes(b"not a safetensors file at all")
    with pytest.raises(UserError, match="not a readable safetensors"):
        read_adapter(path)
    save_adapter(path, {f"{LAYER}.bone": torch.ones(2, 2)}, AdapterMetadata("bone", rank=2, format_version=99))
    with pytest.raises(UserError, match="update this package"):
        read_adapter(path)
    save_file({f"{LAYER}.bone": torch.ones(2, 2)}, path)
    with pytest.raises(UserError, match="does not say which adapter"):
        read_adapter(path)
    with pytest.raises(UserError, match="does not exist"):
        read_adapter(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variant": None}, "variant = None"),
        ({"variant": "vara"}, "variant = 'vara', and one of bone,"),
        ({"variant": "none"}, "names no method .*tensors of an adapter on 1 layers"),
        ({"quant": "q4"}, "quant = 'q4'"),
        ({"rank": "x"}, "rank = 'x'"),
        ({"rank": True}, "rank = True"),
        ({"scale": float("nan")}, "scale = nan"),
        ({"targets": "att.key"}, "targets = 'att.key'"),
        ({"base_fingerprint": 3}, "base_fingerprint = 3"),
        ({"generation": "x050"}, "generation = 'x050', and one of x060, x070"),
    ],
)
def test_adapter_descriptions_that_are_broken_are_refused(tmp_path, changes, message):
    values = {"variant": "bone", "rank": 2, "format_version": 1} | changes
    header = {METADATA_KEY: json.dumps({key: value for key, value in values.items() if value is not None})}
    save_file({f"{LAYER}.bone": torch.ones(2, 2)}, tmp_path / "a.safetensors", header)
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "a.safetensors")


def adapted_model():
    """A module with one adapter parameter and one whole tensor under an RWKV model's names."""
    model = nn.Module()
    model.key = nn.Linear(4, 4, bias=False)
    model.key.bone = nn.Parameter(torch.zeros(2, 4))
    model.ln = nn.LayerNorm(4)
    return model


def test_loading_an_adapter_accounts_for_every_key():
    model, tensors = adapted_model(), {"key.bone": torch.randn(2, 4), "ln.weight": torch.randn(4)}
    load_tensors(model, tensors)
    assert torch.equal(model.key.bone, tensors["key.bone"]) and torch.equal(model.ln.weight, tensors["ln.weight"])


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "matches nothing"),
        ({"model.key.bone": torch.ones(2, 4)}, "matches nothing"),
        ({"ln.weight": torch.ones(4)}, "matches nothing"),
        ({"key.bone": torch.ones(2, 4), "value.bone": torch.ones(2, 4)}, "without a place"),
        ({"key.bone": torch.ones(4, 4)}, "has shape"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_changes(tensors, message):
    model = adapted_model()
    with pytest.raises(UserError, match=message):
        load_tensors(model, tensors)
    assert not model.key.bone.any() and torch.equal(model.ln.weight, torch.ones(4))


def write(folder, word):
    with replacing(folder) as (config, tensors):
        config.write_text('{"peft_type": "' + word + '"}')
        tensors.write_text(word)


def test_a_kill_between_the_names_leaves_no_folder_of_two_halves(tmp_path, monkeypatch):
    write(tmp_path, "old")
    rename = os.replace

    def killed(source, target):
        if os.path.basename(target) == CONFIG:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", killed)
        write(tmp_path, "new")
    assert not is_adapter_folder(tmp_path)
    with pytest.raises(UserError, match="has no adapter_config.json"):
        read_config(tmp_path)
    write(tmp_path, "new")
    assert read_config(tmp_path) == {"peft_type": "new"} and (tmp_path / TENSORS).read_text() == "new"


def test_a_writing_that_fails_leaves_the_old_folder(tmp_path):
    write(tmp_path, "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path) as (config, _):
        config.write_text("{}")
        raise ZeroDivisionError
    assert read_config(tmp_path) == {"peft_type": "old"} and sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS]


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "no settings, but a list")])
def test_settings_that_cannot_be_read_are_refused(tmp_path, text, message):
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)
