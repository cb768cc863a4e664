"""Ranks compare every setting that affects a run, by its flag, and whole files, not samples of them: one different byte
is reported before any step. Paths of files may differ."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.cli.names import ADAPTER, METRICS
from rwkv_peft.config import AdapterConfig, DataConfig, RunConfig, TrainConfig
from rwkv_peft.data.sources import build_samples
from rwkv_peft.data.token_file_writer import TokenFileWriter
from rwkv_peft.models.rwkv6.keys import RWKV6Config
from rwkv_peft.objectives.dpo import DPO
from rwkv_peft.objectives.ipo import IPO
from rwkv_peft.objectives.next_token import NextToken
from rwkv_peft.training.flags.parser import flag_of
from rwkv_peft.training.ranks.agreement import FREE, disagreement, shared_values, sources
from rwkv_peft.training.ranks.world import World
from rwkv_peft.training.saving.resume import data_identity

MODEL = RWKV6Config(n_layer=2, n_embd=64, vocab_size=80, dim_att=64, dim_ffn=96)
CONFIG = RunConfig(MODEL, AdapterConfig(), DataConfig("data"), TrainConfig(), DPO())
IDENTITY, OTHER_DATA = {"data": {"files": "ab", "samples": 40}}, {"files": "ef", "samples": 41}
PARTS = ("adapter", "data", "train", "objective")
SETTINGS = [(part, field) for part in PARTS for field in fields(getattr(CONFIG, part)) if field.init]


def values(config, identity=IDENTITY, step=None):
    """The shared values of a run, which goes on from a step if one is given."""
    checkpoint = step and Path(f"step-{step:08d}")
    inputs = SimpleNamespace(config=config, identity=identity, checkpoint=checkpoint, of_measured={})
    return shared_values(inputs, SimpleNamespace(exam=None, rows=None))


def compare(config, identity=IDENTITY, step=None):
    return disagreement(World(2, 1), [values(CONFIG), values(config, identity, step)], ["first", "second"])


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


def test_data_and_checkpoint_are_compared_and_a_long_list_is_cut():
    assert "the data is 'ab (40 samples)' and 'ef (41 samples)'" in compare(CONFIG, {"data": OTHER_DATA})
    assert "the checkpoint to go on from is None and 'step-00000004'" in compare(CONFIG, step=4)
    assert "the objective is 'dpo' and 'ipo'" in compare(replace(CONFIG, objective=IPO()))
    train = replace(CONFIG.train, lr_init=1.0, lr_final=1.0, beta1=0.5, beta2=0.5, weight_decay=1.0)
    assert "--beta2 is 0.99 and 0.5; and 1 more; give" in compare(replace(CONFIG, train=train))
    assert compare(CONFIG) == ""


@pytest.fixture
def node(tmp_path):
    """(name of a node, how its files differ) -> the values of two runs there; the folders begin with equal files."""

    def write(name, change=lambda folder: None):
        folder = tmp_path / name
        folder.mkdir()
        with TokenFileWriter(folder / "data", vocab_size=80) as writer:
            for number in range(300):
                writer.add([(number + i) % 80 for i in range(20)], [0] * 10 + [1] * 10)
        (folder / "base.pth").write_bytes(bytes(5000))
        (folder / "init_pissa.pth").write_bytes(bytes(50))
        for kind in ("adapter", "states"):
            (folder / kind).mkdir()
            (folder / kind / METRICS).touch()
            save_adapter(folder / kind / ADAPTER, {"a.bone": torch.ones(2, 2, 2)}, AdapterMetadata("bat-in", rank=2))
        (folder / "peft").mkdir()
        (folder / "peft" / "adapter_config.json").write_text("{}")
        (folder / "peft" / "adapter_model.safetensors").write_bytes(bytes(60))
        change(folder)
        return [of_node(folder, load) for load in ("adapter", "peft")]

    return write


def of_node(folder, load):
    config = RunConfig(
        MODEL,
        AdapterConfig(load=str(folder / load), init=str(folder / "init_pissa.pth")),
        DataConfig(str(folder / "data"), ctx_len=16, dataload="pad", loss_mask="file"),
        TrainConfig(load_model=str(folder / "base.pth"), state_load=str(folder / "states")),
        NextToken(),
    )
    return values(config, {"data": data_identity(config, build_samples(config.data, 80))})


def other_byte(name, place=-1):
    def change(folder: Path):
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (folder / name).write_bytes(content)

    return change


def other_document(folder):
    """Change a document outside the identity's samples, by a token that stays in the vocabulary."""
    tokens = np.memmap(folder / "data.bin", dtype="<u2", mode="r+")
    tokens[20 * 7 + 3] ^= 1


def other_adapter(kind):
    def change(folder):
        tensors = {"a.bone": torch.full((2, 2, 2), 1.5)}
        save_adapter(folder / kind / ADAPTER, tensors, AdapterMetadata("bat-in", rank=2))

    return change


CHANGES = {
    "a document of 300": (other_document, "the data is"),
    "a mask": (other_byte("data.mask", 20 * 7 + 15), "the data is"),
    "the base": (other_byte("base.pth", 2500), "the base is"),
    "the first factors": (other_byte("init_pissa.pth"), "the factors that it began with is"),
    "a run's adapter": (other_adapter("adapter"), "the adapter to start from is"),
    "a folder of peft": (other_byte("peft/adapter_model.safetensors"), "the adapter to start from is"),
    "a run's states": (other_adapter("states"), "the states to start from is"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_one_difference_anywhere_is_named(node, what):
    change, words = CHANGES[what]
    first, second = node("first"), node("second", change)
    told = [disagreement(World(2, 1), pair, ["here", "there"]) for pair in zip(first, second)]
    if what in ("a run's adapter", "a folder of peft"):
        told = [text for text in told if text]
    assert told and all(words in text and text.count(" is ") <= 4 for text in told), told


def test_the_code_that_ranks_compare_is_the_whole_package_with_its_kernels():
    names = {f"{path.parent.name}/{path.name}" for path in sources()}
    assert {"training/loop.py", "rwkv7/model.py", "adapters/bone.py"} <= names
    assert any(name.endswith(".cu") for name in names) and any(name.endswith(".cpp") for name in names)


def test_equal_files_in_other_places_agree(node):
    first, second = node("first"), node("second")
    assert [disagreement(World(2, 1), pair, ["here", "there"]) for pair in zip(first, second)] == ["", ""]


def test_a_run_that_goes_on_reads_none_of_the_files_that_it_began_with(tmp_path):
    adapter = AdapterConfig(load=str(tmp_path / "absent"))
    shared = values(RunConfig(MODEL, adapter, DataConfig("data"), TrainConfig(), NextToken()), step=4)
    assert not {"the adapter to start from", "the factors that it began with", "the states to start from"} & {*shared}
