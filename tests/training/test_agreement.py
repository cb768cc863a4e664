"""Ranks compare every setting that affects a run, by its flag; paths of files may differ."""

from dataclasses import fields, replace

import pytest

from rwkv_peft.config import AdapterConfig, DataConfig, RunConfig, TrainConfig
from rwkv_peft.models.rwkv6.keys import RWKV6Config
from rwkv_peft.objectives.dpo import DPO
from rwkv_peft.objectives.ipo import IPO
from rwkv_peft.training.flags.parser import flag_of
from rwkv_peft.training.flags.world import World
from rwkv_peft.training.ranks.agreement import FREE, disagreement, passport

MODEL = RWKV6Config(n_layer=2, n_embd=64, vocab_size=80, dim_att=64, dim_ffn=96)
CONFIG = RunConfig(MODEL, AdapterConfig(), DataConfig("data"), TrainConfig(), DPO())
DATA = {"content": "0123", "counted": "89", "files": "ab", "samples": 40}
IDENTITY = {"base": "abc", "data": DATA}
PARTS = ("adapter", "data", "train", "objective")
SETTINGS = [(part, field) for part in PARTS for field in fields(getattr(CONFIG, part)) if field.init]


def compare(config, identity=IDENTITY, **others):
    passports = [passport(CONFIG, IDENTITY, {}), passport(config, identity, others)]
    return disagreement(World(2, 1), passports, ["first", "second"])


@pytest.mark.parametrize("part, field", SETTINGS, ids=lambda value: getattr(value, "name", value))
def test_every_setting_that_differs_is_named_with_both_values(part, field):
    ours = getattr(getattr(CONFIG, part), field.name)
    theirs = ("other",) if isinstance(ours, tuple) else f"other {ours}"
    told = compare(replace(CONFIG, **{part: replace(getattr(CONFIG, part), **{field.name: theirs})}))
    if field.name in FREE:
        assert told == ""
        return
    ours, theirs = (list(value) if isinstance(value, tuple) else value for value in (ours, theirs))
    name = f"--{flag_of(field)}" if flag_of(field) else field.name
    assert f"rank 1 (node 1 of 2) on second disagree: {name} is {ours!r} and {theirs!r}; give every node" in told


def test_data_base_and_checkpoint_are_compared_and_a_long_list_is_cut():
    other = {"base": "abd", "data": {"content": "4567", "counted": "cd", "files": "ef", "samples": 41}}
    told = compare(CONFIG, other)
    assert "the tokens of the data that count is '89' and 'cd'; the files of the data is 'ab' and 'ef'" in told
    assert "the data is '0123 (40 samples)' and '4567 (41 samples)'" in told
    assert "the base's fingerprint is 'abc' and 'abd'" in told
    assert "the checkpoint is None and 'step-00000004'" in compare(CONFIG, **{"the checkpoint": "step-00000004"})
    assert "the objective is 'dpo' and 'ipo'" in compare(replace(CONFIG, objective=IPO()))
    train = replace(CONFIG.train, lr_init=1.0, lr_final=1.0, beta1=0.5, beta2=0.5, weight_decay=1.0)
    assert "--beta2 is 0.99 and 0.5; and 1 more; give" in compare(replace(CONFIG, train=train))
    assert compare(CONFIG) == ""
