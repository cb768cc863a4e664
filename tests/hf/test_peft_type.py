"""Registration: BONE becomes a method of the installed peft, once, and only of a peft that is known."""

import copy
import pickle

import peft
import pytest

from rwkv_peft.errors import UserError
from rwkv_peft.hf import BoneConfig, BoneModel, peft_type, register


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
    register(replace=True)
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["BONE"] is BoneConfig


@pytest.mark.parametrize("version", ("0.12.0", "0.22.0", "1.0.0"))
def test_an_unknown_peft_is_refused(monkeypatch, version):
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(UserError, match=f"{version} is installed; pip install"):
        peft_type.check_version()
