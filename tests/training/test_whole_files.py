"""Ranks compare whole files, not samples of them: one different byte is reported before any step."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.cli.names import ADAPTER, METRICS
from rwkv_peft.config import AdapterConfig, DataConfig, RunConfig, TrainConfig
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.data.sources import build_samples
from rwkv_peft.models.rwkv6.keys import RWKV6Config
from rwkv_peft.objectives.next_token import NextToken
from rwkv_peft.training.flags.world import World
from rwkv_peft.training.ranks.agreement import digests_of_inputs, disagreement, passport
from rwkv_peft.training.saving.resume import data_identity

TEACHERS = ("file of the teacher", "teacher's adapters", "teacher's states")
MODEL = RWKV6Config(n_layer=2, n_embd=64, vocab_size=80, dim_att=64, dim_ffn=96)


@pytest.fixture
def node(tmp_path):
    """(name of a node, how its files differ) -> its passport; the nodes' folders begin with equal files."""

    def write(name, change=lambda folder: None):
        folder = tmp_path / name
        folder.mkdir()
        with ShardWriter(folder / "data", vocab_size=80) as writer:
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
    identity = {"base": "abc", "data": data_identity(config, build_samples(config.data, 80))}
    return passport(config, identity, digests_of_inputs(config, goes_on=False))


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
    "a document of 300": (other_document, "the files of the data is"),
    "a mask": (other_byte("data.mask", 20 * 7 + 15), "the files of the data is"),
    "the base": (other_byte("base.pth", 2500), "the file of the base is"),
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


def test_equal_files_in_other_places_agree(node):
    first, second = node("first"), node("second")
    assert [disagreement(World(2, 1), pair, ["here", "there"]) for pair in zip(first, second)] == ["", ""]


def test_a_run_that_goes_on_reads_none_of_the_files_that_it_began_with(tmp_path):
    adapter = AdapterConfig(load=str(tmp_path / "absent"))
    found = digests_of_inputs(RunConfig(MODEL, adapter, DataConfig("data"), TrainConfig(), NextToken()), goes_on=True)
    assert found.keys() == {"the file of the base", *(f"the {x}" for x in TEACHERS)}
