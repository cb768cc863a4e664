"""Adapter files carry their own description, and a faulty one is refused; the folder of a run stands for the file that
is best for held-out rows."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rwkv_peft.adapters.inject import load_tensors
from rwkv_peft.checkpoints.adapter_file import ENTRY, METADATA_KEY, Adapter, AdapterMetadata, Origin, save_adapter
from rwkv_peft.checkpoints.adapters import adapter_of_run, product_of_run, read_adapter
from rwkv_peft.checkpoints.best import take
from rwkv_peft.checkpoints.tensors import read_safetensors
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import AdapterConfig
from rwkv_peft.models import family_named
from rwkv_peft.release.push import files_of

LAYER = "blocks.0.att.key"


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


def test_adapter_settings_come_back_from_metadata():
    config = AdapterConfig(method="lora", rank=4, alpha=8.0, targets=("att.key",), train_parts=("ln",))
    adapter = Adapter({}, AdapterMetadata.from_config(config))
    assert adapter.config(family_named("x060")) == config


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
        ("lora", {"alpha": 128.0}, "--lora_alpha 128 contradicts .*, a lora adapter of alpha 8;"),
        ("lora", {"init": "init_pissa.pth"}, "--lora_init init_pissa.pth is for RWKV-PEFT's PiSSA files"),
        ("bone", {"alpha": 8.0}, "--lora_alpha 8 contradicts .*, a bone adapter, which has no alpha;"),
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
    with pytest.raises(UserError, match="does not exist"):
        read_adapter(path)
    path.write_bytes(b"not a safetensors file at all")
    with pytest.raises(UserError, match="not a readable safetensors"):
        read_adapter(path)
    for block, message in ((torch.ones(2, 2), "does not say which adapter"), (torch.ones(2).long(), "bone is int64")):
        save_file({f"{LAYER}.bone": block}, path)
        with pytest.raises(UserError, match=message):
            read_adapter(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variant": None}, "variant = None"),
        ({"format_version": 99}, "update this package"),
        ({"format_version": "x"}, "metadata cannot be read"),
        ({"format_version": float("inf")}, "metadata cannot be read"),
        ({"variant": "vara"}, "variant = 'vara', and one of bone,"),
        ({"variant": "shira", "entries": 8}, "is a shira adapter, and version 0.3.0 of rwkv-peft is the last"),
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


def test_a_bit_that_changed_in_an_adapter_is_found(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(path, {f"{LAYER}.bone": torch.ones(2, 2).bfloat16()}, AdapterMetadata("bone", rank=2))
    assert read_adapter(path).tensors[f"{LAYER}.bone"].sum() == 4
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="not those that were written"):
        read_adapter(path)


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


@pytest.fixture
def run(tmp_path):
    """Make a run's folder with the newest and the best of a file, validation losses of ten steps of 8 samples each,
    and settings."""

    def made(*losses, name="adapter", ending=".safetensors", **settings):
        lines = [{"step": 0, "samples": 8, "val_start": 3.0}]
        lines += [{"step": 10 * n - 1, "samples": 80 * n, "val_loss": loss} for n, loss in enumerate(losses, 1)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"val_lo')
        (tmp_path / "config.json").write_text(json.dumps(settings))
        for label in ("", "-best"):
            (tmp_path / f"{name}{label}{ending}").touch()
        return tmp_path

    return made


@pytest.mark.parametrize(
    "losses, label",
    [((1.0, 0.5, 0.2), ""), ((1.0, 0.5, 0.6), ""), ((1.0, 0.5, 0.9), "-best"), ((3.2, 3.1, 4.0), "-best"), ((), "")],
)
@pytest.mark.parametrize("name, ending", [("adapter", ".safetensors"), ("rwkv", ".pth")])
def test_the_best_is_taken_if_it_is_clearly_better(run, losses, label, name, ending, capsys):
    folder = run(*losses, name=name, ending=ending)
    path = folder / f"{name}{label}{ending}"
    assert product_of_run(folder, tell=True) == path and files_of(folder, None) == [path]
    err = capsys.readouterr().err
    assert bool(err) == bool(label)
    if label:
        lowest, last = min(losses), losses[-1]
        assert f"{lowest:.4f}, and was {last:.4f} after step 30; to take what trained last, name {folder / name}" in err
    other = take(folder).other
    assert {path, other} == set(folder.glob(f"{name}*")) and product_of_run(other, tell=True) == other


def test_losses_on_other_rows_and_what_is_no_loss_do_not_count(run):
    assert take(run(0.1, 0.9, 0.8)).note and not take(run(0.1, 0.9, 0.8, validated_from=80)).note
    for lines in ('{"step": "x", "val_loss": 0.1}', '{"step": 1, "val_loss": 1e999}', "[" * 5000 + '"val_', ""):
        folder = run(0.5, 0.4)
        (folder / "metrics.jsonl").write_text(lines + "\n" + (folder / "metrics.jsonl").read_text())
        assert take(folder).path.name == "adapter.safetensors"
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    assert take(folder).path.name == "adapter.safetensors"
    (folder / "adapter.safetensors").unlink()  # the run ended before its first save
    assert take(folder).other is None


def test_reading_the_folder_tells_which_adapter_it_is(run, capsys):
    folder = run(1.0, 0.5, 0.9)
    for number, label in enumerate(("", "-best")):
        tensors = {"blocks.0.ffn.key.bone": torch.full((8, 192), float(number))}
        save_adapter(folder / f"adapter{label}.safetensors", tensors, AdapterMetadata("bone", 8, targets=("ffn.key",)))
    assert read_adapter(folder).tensors["blocks.0.ffn.key.bone"].unique() == 1
    assert capsys.readouterr().err.startswith(f"note: {adapter_of_run(folder)} is taken")
    assert read_adapter(folder / "adapter.safetensors").tensors["blocks.0.ffn.key.bone"].unique() == 0
    assert capsys.readouterr().err == ""
