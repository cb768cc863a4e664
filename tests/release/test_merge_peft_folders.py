"""Folders of Hugging Face peft merge as peft merges them, or are refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from release.merges import RANK, adapter_of, run
from rwkv_peft.checkpoints.adapter_file import Adapter
from rwkv_peft.checkpoints.base import base_of, open_base
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models.rwkv6.model import RWKV6
from rwkv_peft.release.merge import merged_tensors


@pytest.mark.parametrize(
    "kind, init, variant",
    [
        ("BONE", True, "bone"),
        ("BONE", "bat", "bat-out"),
        ("BONE", True, "bat-out"),
        ("BONE", "bat-in", "bat-in"),
        ("BONE", "bat-out", "bat-out"),
        ("BONE", False, "bone"),
        ("MISS", True, "bone"),
        ("MISS", "bat", "bat-out"),
        ("MISS", "mini", "bone-mini"),
        *(("LORA", init, "lora") for init in (True, "gaussian", "orthogonal", "eva", "mica")),
    ],
)
@pytest.mark.parametrize("official", [True, False])
def test_folders_of_hugging_face_peft_merge(folder, kind, init, variant, official):
    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of(variant, base)
    told = "init_lora_weights" if kind == "LORA" else "init_weights"
    write_hf_folder(folder, tensors, {"peft_type": kind, told: init}, official)
    merged = run(folder, adapter="hf")
    expected = merged_tensors(base_of(base), [("a", Adapter(tensors, metadata))])
    assert all(torch.equal(merged[key], expected[key]) for key in base)


def write_hf_folder(folder, tensors, config, official=True):
    """Write a folder hf as peft saves it; config is added to the settings that all of them have here."""
    kind, peft = config["peft_type"], {}
    for key, tensor in tensors.items():
        key = (
            key.replace(".bone", f".{kind.lower()}_block")
            .replace("lora_A", "lora_A.weight")
            .replace("lora_B", "lora_B.weight")
        )
        if not official:
            key = "rwkv." + key.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
        peft[f"base_model.model.{key}"] = tensor
    (folder / "hf").mkdir()
    save_file(peft, folder / "hf" / "adapter_model.safetensors")
    config = {"r": RANK, "mini_r": 4, "lora_alpha": 4, "init_lora_weights": True} | config
    given = {key: value for key, value in config.items() if value != "none"}
    (folder / "hf" / "adapter_config.json").write_text(json.dumps(given))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"peft_type": "IA3", "r": 4}, "IA3 adapter"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_dora": True}, "use_dora"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "init_lora_weights": "loftq"}, "loftq.*changes the base"),
        (None, r"^\S+ has no adapter_config.json"),
    ],
)
def test_folders_that_cannot_be_merged_are_refused(folder, config, message):
    (folder / "hf").mkdir()
    save_file(
        {"base_model.model.blocks.0.att.key.bone_block": torch.ones(4, 64)}, folder / "hf" / "adapter_model.safetensors"
    )
    if config:
        (folder / "hf" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        run(folder, adapter="hf")


@pytest.mark.parametrize(
    "variant, config, message",
    [
        ("bone", {"init_weights": "bat-in"}, "goes with tensors of 3 dimensions"),
        ("bat-in", {"init_weights": "mini"}, "goes with tensors of 2 dimensions"),
        ("bone", {"init_weights": "ortho"}, "init_weights is 'ortho'"),
        ("bone", {"r": 64}, "and r is 64"),
        ("bone", {"r": "none"}, "r = None"),
        ("lora", {"peft_type": "LORA", "r": True}, "r = True"),
        ("lora", {"peft_type": "LORA", "lora_alpha": "none"}, "lora_alpha = None"),
        ("lora", {"peft_type": "LORA", "lora_alpha": float("inf")}, "lora_alpha = inf"),
        ("lora", {"peft_type": "LORA", "r": 64}, "lora_A has shape .* and r is 64"),
        ("lora", {"peft_type": "LORA", "lora_bias": True}, "lora_bias"),
        ("lora", {"peft_type": "LORA", "alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ("lora", {"peft_type": "LORA", "kasa_config": {"kasa_beta": 1e-4}}, "kasa_config"),
    ],
)
def test_settings_of_peft_that_contradict_the_tensors_are_refused(folder, variant, config, message):
    tensors, _ = adapter_of(variant, open_base(folder / "base.pth").tensors)
    write_hf_folder(folder, tensors, {"peft_type": "BONE", "init_weights": True} | config)
    with pytest.raises(UserError, match=message):
        run(folder, adapter="hf")


def test_settings_of_peft_that_are_no_object_are_refused(folder):
    write_hf_folder(folder, adapter_of("bone", open_base(folder / "base.pth").tensors)[0], {"peft_type": "BONE"})
    (folder / "hf" / "adapter_config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no settings, but a list"):
        run(folder, adapter="hf")


@pytest.mark.parametrize("init", [True, "bat", "bat-in", "mini"])
def test_bone_trained_through_our_own_config_merges_as_it_unloads(folder, init):
    peft = pytest.importorskip("peft")
    from rwkv_peft.hf import BoneConfig

    mini = {"mini_r": 4} if init == "mini" else {}
    base = open_base(folder / "base.pth").tensors
    model = RWKV6(base_of(base).config)
    model.load_state_dict({key: tensor.float() for key, tensor in base.items()})
    targets = ["att.key", "att.value", "ffn.key"]
    wrapped = peft.get_peft_model(model, BoneConfig(r=RANK, init_weights=init, target_modules=targets, **mini))
    for name, parameter in wrapped.named_parameters():
        if "_block" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(folder / "hf")
    merged = run(folder, "--output_dtype", "fp32", adapter="hf")
    expected = wrapped.merge_and_unload().state_dict()
    assert set(expected) == set(merged)
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)
    assert (merged["blocks.0.att.key.weight"] - base["blocks.0.att.key.weight"]).abs().max() > 0.01


def test_a_folder_of_another_architecture_is_refused(folder, shared_data):
    with pytest.raises(UserError, match="no place in the base"):
        run(folder, adapter=shared_data / "peft_bone_adapters" / "bone_r4")
