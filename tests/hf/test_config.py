"""BoneConfig and its registration: forms, targets, refusals, its file, and BONE as a method of peft."""

import copy
import json
import pickle

import peft
import pytest
from peft import get_peft_model

from rwkv_peft.cli.errors import UserError
from rwkv_peft.hf import BoneConfig, BoneLinear, BoneModel
from rwkv_peft.hf.register import check_version, enter


def test_the_new_member_behaves_as_those_that_the_class_statement_made():
    member = peft.PeftType.BONE
    assert member == "BONE" and isinstance(member, peft.PeftType) and member in list(peft.PeftType)
    assert peft.PeftType("BONE") is peft.PeftType["BONE"] is member
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    assert repr(member) == repr(peft.PeftType.LORA).replace("LORA", "BONE")


def test_peft_builds_our_classes_and_registering_twice_changes_nothing():
    before = list(peft.PeftType)
    enter(BoneConfig, BoneModel)
    assert list(peft.PeftType) == before
    assert isinstance(peft.get_peft_config({"peft_type": "BONE", "r": 8}), BoneConfig)
    assert peft.BoneConfig is BoneConfig and peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["BONE"] is BoneModel


@pytest.mark.parametrize("version", ("0.18.1", "0.22.0", "1.0.0"))
def test_an_unknown_peft_is_refused(monkeypatch, version):
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(UserError, match=f"{version} is installed; pip install"):
        check_version()


def test_the_forms_by_name():
    names = {True: "bone", False: "bone", "bone": "bone", "bat": "bat-out", "bat-out": "bat-out", "bat-in": "bat-in"}
    assert {form: BoneConfig(init_weights=form).method.name for form in names} == names


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"init_weights": "bta"}, "init_weights='bta' is unknown; give True"),
        ({"init_weights": 1}, "init_weights=1 is unknown"),
        ({"r": 0}, "r=0 is not a rank"),
        ({"init_weights": "mini"}, "needs mini_r"),
        ({"bone_dropout": 1.5}, "bone_dropout=1.5 is not a probability"),
        ({"bias": "some"}, "bias='some' is unknown"),
        ({"modules_to_save": "lm_head"}, r"modules_to_save='lm_head' is no list of names; give \['lm_head'\]"),
        ({"r": "64"}, "r='64' is not a whole number"),
        ({"r": None}, "r=None is not a whole number"),
        ({"bone_dropout": None}, "bone_dropout=None is not a probability"),
        ({"mini_r": 4}, "mini_r=4 is for init_weights='mini'"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "give layers_to_transform too"),
        ({"target_modules": ".*proj", "layers_to_transform": [1]}, "layers_to_transform works with a list"),
    ],
)
def test_a_contradiction_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        BoneConfig(**settings)


@pytest.mark.parametrize("name", ("rank_pattern", "alpha_pattern", "layer_replication", "target_parameters"))
def test_a_setting_of_lora_alone_is_refused(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        BoneConfig(**{name: {}})


def test_what_older_peft_does_not_know_is_written_only_where_it_is_used(tmp_path):
    BoneConfig(r=4, init_weights="bat-out").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["init_weights"] == "bat" and not {"mini_r", "bone_dropout"} & set(written)
    config = BoneConfig(r=4, init_weights="mini", mini_r=4, bone_dropout=0.1)
    config.save_pretrained(tmp_path)
    again = BoneConfig.from_pretrained(tmp_path)
    assert (again.method.name, again.mini_r, again.bone_dropout) == ("bone-mini", 4, 0.1)


QUERIES = {f"{i}.self_attn.q_proj" for i in range(3)}


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, {f"{i}.self_attn.{name}" for i in range(3) for name in ("q_proj", "v_proj")}),
        ({"target_modules": r".*\.1\.mlp\.(up|down)_proj"}, {"1.mlp.up_proj", "1.mlp.down_proj"}),
        ({"target_modules": ["up_proj"], "layers_to_transform": [0, 2]}, {"0.mlp.up_proj", "2.mlp.up_proj"}),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}, QUERIES),
        ({"target_modules": "all-linear"}, 21),
    ],
)
def test_targets(llama, settings, expected):
    llama.model.layers = llama.model.layers[:3]
    model = get_peft_model(llama, BoneConfig(r=4, **settings))
    found = [name for name, module in model.named_modules() if isinstance(module, BoneLinear)]
    found = {name.removeprefix("base_model.model.model.layers.") for name in found}
    assert found == expected or len(found) == expected


def test_a_target_that_matches_nothing_is_refused(llama):
    with pytest.raises(ValueError, match="(?i)target modules .*nothing_like_it.* not found"):
        get_peft_model(llama, BoneConfig(r=4, target_modules=["nothing_like_it"]))


def test_a_name_that_is_passed_over_is_told(llama):
    settings = {"target_modules": ["q_proj", "k_prog"], "modules_to_save": ["lm_hed", "score"]}
    with pytest.warns(UserWarning) as told:
        get_peft_model(llama, BoneConfig(r=4, **settings))
    said = [str(warning.message) for warning in told if "passed over" in str(warning.message)]
    names = "'k_prog' of target_modules", "'lm_hed' of modules_to_save"
    assert said == [f"{name} is no module of the model, and is passed over" for name in names]


def test_trainable_parameters_are_counted(llama, capsys):
    model = get_peft_model(llama, BoneConfig(r=4, target_modules=["q_proj"], init_weights="bat-in"))
    model.print_trainable_parameters()
    assert f"trainable params: {llama.config.num_hidden_layers * 64 * 4:,} " in capsys.readouterr().out
