"""Packing fills rows with whole documents; validation keeps samples out of training."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import DataConfig
from rwkv_peft.data.batches import EvalBatches, TrainBatches
from rwkv_peft.data.pack import pack
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.data.sources import build_samples, split_samples


@pytest.fixture
def config(tmp_path):
    """config(documents, **settings) -> the DataConfig of a data set that holds them."""

    def make(documents, **settings):
        with ShardWriter(tmp_path / "data") as writer:
            for document in documents:
                writer.add(document)
        return DataConfig(path=str(tmp_path / "data"), **settings)

    return make


@given(st.lists(st.integers(1, 20), min_size=1, max_size=80))
@settings(max_examples=80, deadline=None)
def test_rows_hold_each_document_once_and_never_too_much(lengths):
    rows = pack(np.array(lengths), 20)
    assert sorted(position for row in rows for position in row) == list(range(len(lengths)))
    loads = sorted(sum(lengths[position] for position in row) for row in rows)
    assert loads[-1] <= 20
    assert len(rows) == 1 or loads[0] + loads[1] > 20  # no two rows would fit into one


def test_a_packed_batch_holds_the_documents_and_where_they_begin(config):
    documents = [[100 * i + j for j in range(2 + i)] for i in range(12)]
    samples = build_samples(config(documents, ctx_len=16, dataload="pack"), 65536)
    batches, seen = iter(TrainBatches(samples, 2)), []
    for _ in range(0, len(samples), 2):
        batch = next(batches)
        begins = batch["cu_seqlens"].tolist()
        assert batch["tokens"].shape == batch["targets"].shape == batch["mask"].shape == (1, begins[-1])
        assert batch["cu_seqlens"].dtype == torch.int64 and batch["mask"].all()
        assert begins[-1] <= 2 * 16 and batch["step_count"] == int(batch["mask"].sum())
        for begin, end in zip(begins, begins[1:]):
            seen.append([*batch["tokens"][0, begin:end].tolist(), int(batch["targets"][0, end - 1])])
            assert seen[-1][1:] == batch["targets"][0, begin:end].tolist()
    batches.close()
    assert {tuple(document) for document in seen} == {tuple(document) for document in documents}


def test_packing_says_how_full_the_rows_are_and_what_it_cuts(config):
    samples = build_samples(config([[1] * 9, [2] * 5, [3] * 5, [4] * 30], ctx_len=8, dataload="pack"), 65536)
    assert len(samples) == 3
    assert "packed into 3 rows of --ctx_len 8, 100.0% full" in samples.notes
    assert any("1 document of more than --ctx_len 8" in note for note in samples.notes)


@pytest.mark.parametrize("dataload", ["get", "pad", "only", "pack"])
def test_a_split_shares_nothing_and_loses_nothing(config, dataload):
    documents = [[i + 1] * (3 + i % 3) for i in range(60)]
    made = config(documents, ctx_len=4, dataload=dataload)
    whole = build_samples(made, 65536)
    train, held_out = split_samples(made, 65536, 0.1)
    units = [{samples.unit(n) for n in range(len(samples))} for samples in (whole, train, held_out)]
    assert units[1] | units[2] == units[0] and not units[1] & units[2]
    assert len(held_out) == round(0.1 * len(whole)) == len(units[2])
    assert {train.unit(n) for n in range(len(train), 2 * len(train))} == units[1]
    again = split_samples(made, 65536, 0.1)[1]
    assert {again.unit(n) for n in range(len(again))} == units[2]
    assert any("kept for validation" in note for note in train.notes)
    other = replace(made, seed=made.seed + 1)
    drawn = [split_samples(each, 65536, 0.1, seed)[1] for each, seed in ((made, 7), (other, 7), (other, made.seed))]
    by_seven, again_by_seven, by_the_first = ({held.unit(n) for n in range(len(held))} for held in drawn)
    assert by_seven == again_by_seven != units[2] == by_the_first


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 0.99])
def test_a_split_that_leaves_nothing_is_named(config, fraction):
    with pytest.raises(UserError, match="--val_split"):
        split_samples(config([[1, 2], [3, 4]], dataload="pad"), 65536, fraction)


@pytest.mark.parametrize("dataload", ["pad", "pack"])
@pytest.mark.parametrize("world_size, micro_bsz", [(1, 1), (1, 4), (2, 3), (3, 2)])
def test_validation_reads_every_sample_once_on_as_many_batches_a_rank(config, dataload, world_size, micro_bsz):
    samples = build_samples(config([[i + 1] * 3 for i in range(13)], ctx_len=4, dataload=dataload), 65536)
    counted, lengths = [], set()
    for rank in range(world_size):
        batches = EvalBatches(samples, micro_bsz, rank, world_size)
        lengths.add(len(list(batches)))
        assert len(batches) == len(list(batches))
        for batch in batches:
            counted += batch["targets"][batch["mask"]].tolist()
    assert len(lengths) == 1
    assert sorted(counted) == sorted([i + 1 for i in range(13)] * 2)
