"""Registration: BONE becomes a method of the installed peft, once, and only of a peft that is known.

If that peft has a Bone of its own (0.14 to 0.18), ours takes its place only if asked;
versions.sh runs these tests under each version.
"""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from bone_blocks import fill

from rwkv_peft.cli.errors import UserError
from rwkv_peft.hf import BoneConfig, BoneModel, installed, register

PEFT_HAS_BONE = installed.version() < installed.WITHOUT_BONE


def test_the_new_member_behaves_as_those_that_the_class_statement_made():
    member = peft.PeftType.BONE
    assert member == "BONE" and isinstance(member, peft.PeftType) and member in list(peft.PeftType)
    assert peft.PeftType("BONE") is peft.PeftType["BONE"] is member
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    assert repr(member) == repr(peft.PeftType.LORA).replace("LORA", "BONE")


def test_peft_builds_our_classes_and_registering_twice_changes_nothing():
    before = list(peft.PeftType)
    register()
    assert list(peft.PeftType) == before
    assert isinstance(peft.get_peft_config({"peft_type": "BONE", "r": 8}), BoneConfig)
    assert peft.BoneConfig is BoneConfig and peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["BONE"] is BoneModel


def test_another_bone_of_peft_is_left_or_replaced_as_chosen(monkeypatch):
    theirs = type("BoneConfig", (), {})
    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, peft.PeftType.BONE, theirs)
    register()
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["BONE"] is theirs
    with pytest.raises(UserError, match="has a Bone of its own.*register.replace=True"):
        BoneConfig(r=4)
    register(replace=True)
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["BONE"] is BoneConfig
    BoneConfig(r=4)


@pytest.mark.parametrize("version", ("0.13.2", "0.22.0", "1.0.0"))
def test_an_unknown_peft_is_refused(monkeypatch, version):
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(UserError, match=f"{version} is installed; pip install"):
        installed.check_version()


@pytest.mark.skipif(not PEFT_HAS_BONE, reason="the installed peft has no Bone of its own")
def test_a_configuration_of_the_replaced_bone_is_refused(llama):
    from peft.tuners.bone import BoneConfig as Theirs

    with pytest.raises(UserError, match="import BoneConfig from rwkv_peft.hf"):
        peft.get_peft_model(llama, Theirs(r=4, target_modules=["q_proj"]))


@pytest.mark.skipif(not PEFT_HAS_BONE, reason="the installed peft has no Bone of its own")
def test_left_alone_pefts_own_bone_loads_what_is_saved_here(llama, llama_folder, ids, tmp_path):
    """In this process importing rwkv_peft.hf changes nothing, so that peft's own layers are used."""
    for form in (True, "bat"):
        config = BoneConfig(r=4, init_weights=form, target_modules="all-linear")
        model = fill(peft.get_peft_model(copy.deepcopy(llama), config))
        model.eval().save_pretrained(tmp_path / str(form))
        path = tmp_path / str(form) / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": "0.21.2"}))  # as newer peft writes
        with torch.no_grad():
            np.savez(tmp_path / str(form) / "golden.npz", ids=ids, adapted=model(input_ids=ids).logits)
    script = Path(__file__).with_name("own_bone.py")
    subprocess.run([sys.executable, script, llama_folder, tmp_path / "True", tmp_path / "bat"], check=True)


@pytest.mark.skipif(not PEFT_HAS_BONE, reason="the installed peft has no Bone of its own")
def test_an_adapter_of_pefts_own_bone_saved_anew_is_as_good_to_it(shared_data, tmp_path):
    from transformers import AutoModelForCausalLM

    base, golden = shared_data / "llama_stories260K_hf", shared_data / "peft_bone_adapters" / "bone_r4"
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), golden).save_pretrained(tmp_path)
    (tmp_path / "golden.npz").write_bytes((golden / "golden.npz").read_bytes())
    subprocess.run([sys.executable, Path(__file__).with_name("own_bone.py"), base, tmp_path], check=True)
