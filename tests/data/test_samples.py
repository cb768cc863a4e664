"""Samples: every token or document once an epoch, in an order of the seed; packed rows; parts for validation, and what
they share with training rows."""

import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import DataConfig
from rwkv_peft.data.answer_samples import overlap_notes
from rwkv_peft.data.batches import EvalBatches, TrainBatches
from rwkv_peft.data.samples import Permutation, is_prime, pack
from rwkv_peft.data.sources import build_samples, split_samples
from rwkv_peft.data.token_file_writer import TokenFileWriter


@pytest.fixture
def make(tmp_path):
    """make(documents, **settings) -> samples over these documents."""

    def build(documents, vocab_size=65536, masks=None, **settings):
        with TokenFileWriter(tmp_path / "data") as writer:
            for i, document in enumerate(documents):
                writer.add(document, None if masks is None else masks[i])
        return build_samples(DataConfig(path=str(tmp_path / "data"), **settings), vocab_size)

    return build


def epoch_of(samples, epoch=0):
    return [samples[epoch * len(samples) + i] for i in range(len(samples))]


@pytest.mark.parametrize("total", [9, 10, 17, 18, 64, 65, 131])
def test_an_epoch_of_the_stream_counts_every_token_but_the_first_once(make, total):
    samples = make([list(range(100, 100 + total // 2)), list(range(100 + total // 2, 100 + total))], ctx_len=8)
    for epoch in (0, 1):
        seen = Counter()
        for tokens, mask in epoch_of(samples, epoch):
            assert (tokens.dtype, mask.dtype, tokens.shape, mask.shape) == (torch.int64, torch.bool, (9,), (8,))
            assert torch.equal(tokens, torch.arange(int(tokens[0]), int(tokens[0]) + 9))
            seen.update(tokens[1:][mask].tolist())
        assert seen == Counter(range(101, 100 + total))


@pytest.mark.parametrize("micro_bsz", [1, 8])
@pytest.mark.parametrize("rows", [12, 200])
def test_rows_are_not_seen_shortest_first(make, rows, micro_bsz):
    samples = make([[1] * (2 + i) for i in range(rows)], ctx_len=256, dataload="pad", micro_bsz=micro_bsz)
    orders = [[len(tokens) for tokens, _ in epoch_of(samples, epoch)] for epoch in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    rising = sum(a < b for order in orders for a, b in zip(order, order[1:]))
    assert 0.4 < rising / (20 * (rows - 1)) < 0.6  # of neighbours, as many rise as fall
    first = sum(order[0] for order in orders) / 20
    assert abs(first - (rows + 3) / 2) < rows / 4  # and the first is any of them


@pytest.mark.parametrize("dataload, micro_bsz", [("pad", 1), ("pad", 8), ("only", 1)])
def test_an_epoch_of_documents_reads_each_once(make, dataload, micro_bsz):
    documents = [[i + 1] * (2 + i % 7) for i in range(1100)]
    samples = make(documents, ctx_len=16, dataload=dataload, micro_bsz=micro_bsz)
    for epoch in (0, 1):
        assert sorted(tokens.tolist() for tokens, _ in epoch_of(samples, epoch)) == sorted(documents)


@pytest.mark.parametrize("dataload", ["get", "pad", "only"])
def test_without_a_seed_samples_come_in_the_order_of_the_file(make, dataload):
    samples = make([[i + 1] * (9 + i % 7) for i in range(600)], ctx_len=8, dataload=dataload, seed=None)
    first = [int(tokens[0]) for tokens, _ in epoch_of(samples)]
    assert len(first) >= 600 and first == sorted(first)
    assert first == [int(tokens[0]) for tokens, _ in epoch_of(samples, 1)]


def test_bucketing_brings_like_lengths_together(make):
    documents = [[1] * (2 + (i * 7919) % 97) for i in range(1024)]

    def padding(samples):
        rows = [len(tokens) for tokens, _ in epoch_of(samples)]
        return sum(8 * max(rows[i : i + 8]) for i in range(0, len(rows), 8)) / sum(rows) - 1

    assert padding(make(documents, dataload="pad", ctx_len=128, micro_bsz=8)) < 0.1
    assert padding(make(documents, dataload="pad", ctx_len=128, micro_bsz=1)) > 0.5
    assert padding(make(documents, dataload="only", ctx_len=128)) > 0.5


@pytest.mark.parametrize("dataload", ["get", "pad", "only"])
def test_the_order_depends_on_seed_and_epoch_alone(make, dataload):
    documents = [[i + 1, i + 2, i + 3] for i in range(40)]

    def order(seed, epoch=0, **settings):
        samples = make(documents, ctx_len=2, dataload=dataload, seed=seed, **settings)
        return [tokens.tolist() for tokens, _ in epoch_of(samples, epoch)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1) != order(1, epoch=1)
    if dataload != "only":
        assert order(1, micro_bsz=2) == order(1, micro_bsz=4)
    if dataload == "get":
        assert order(1, micro_bsz=1) == order(1, micro_bsz=4)


@pytest.mark.parametrize("dataload", ["get", "pad", "only"])
@pytest.mark.parametrize("mask", ["none", "file", "qa"])
def test_count_is_the_masks_sum(make, dataload, mask):
    documents = [[9, 9, 1, 2, 3, 4][: 2 + i % 5] for i in range(23)]
    masks = [[0, 0, 1, 0, 1, 1][: 2 + i % 5] for i in range(23)]
    markers = {"mask_id": (1,)} if mask == "qa" else {}
    samples = make(documents, masks=masks, ctx_len=4, dataload=dataload, loss_mask=mask, **markers)
    counts = [samples.count(n) for n in range(2 * len(samples))]
    assert counts == [int(samples[n][1].sum()) for n in range(2 * len(samples))]
    assert mask == "none" or sum(counts) < 2 * sum(map(len, documents)) / 2


def test_long_documents_are_cut_and_counted(make):
    samples = make([[1] * 20, [2] * 9, [3] * 3, [4]], ctx_len=8, dataload="pad")
    assert sorted(len(tokens) for tokens, _ in epoch_of(samples)) == [3, 9, 9]
    text = "\n".join(samples.notes)
    assert "1 document of more than --ctx_len 8 tokens, cut there: 11 of 33 tokens" in text and "--ctx_len 19" in text
    assert "1 document of fewer than 2 tokens is left out" in text


@pytest.mark.parametrize("mask", ["file", "qa"])
def test_answers_behind_the_cut_are_counted_wherever_documents_lie(make, mask):
    rng = random.Random(0)
    documents = [[rng.choice((5, 6, 7)) for _ in range(rng.randrange(1, 24))] for _ in range(60)]
    masks = [[rng.random() < 0.1 for _ in document] for document in documents]
    markers = {"mask_id": (6, 7), "mask_end_id": (5,)} if mask == "qa" else {}
    given = dict(masks=masks, loss_mask=mask, dataload="pad", **markers)
    whole, cut = (make(documents, ctx_len=ctx_len, **given) for ctx_len in (30, 8))
    lost = [whole.document_count(i) - cut.document_count(i) for i in whole.units]
    bare = sum(lost > 0 and not cut.document_count(i) for lost, i in zip(lost, whole.units))
    assert f"note: {sum(lost)} of the tokens that would count" in cut.notes[-1]
    assert f"and {bare} documents keep none" in cut.notes[-1] and bare > 1
    assert not any("would count" in note for note in whole.notes)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(ctx_len=6), "--ctx_len 6: .* holds 6 tokens.*take --ctx_len 5"),
        (dict(dataload="only", micro_bsz=2), "does not go with --micro_bsz 2"),
        (dict(loss_mask="pad"), "has no padding"),
        (dict(vocab_size=257), "token 300 at position 5"),
    ],
)
def test_contradictions_are_named(make, settings, message):
    with pytest.raises(UserError, match=message):
        make([[1, 2, 3], [4, 5, 300]], **{"ctx_len": 2, **settings})


def test_documents_too_short_to_predict_are_an_error(make):
    with pytest.raises(UserError, match="nothing to predict"):
        make([[1], [2]], dataload="pad")


@pytest.fixture
def config(tmp_path):
    """config(documents, **settings) -> the DataConfig of a data set that holds them."""

    def make(documents, **settings):
        with TokenFileWriter(tmp_path / "data") as writer:
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


@pytest.mark.parametrize("size", [*range(1, 70), 509, 510, 512, 1000])
def test_every_position_once(size):
    for key in ((0, 0), (0, 1), (7, 0)):
        assert sorted(Permutation(size, *key)) == list(range(size))


def test_the_order_is_the_keys_alone():
    assert list(Permutation(100, 42, 3)) == list(Permutation(100, 42, 3))
    orders = {tuple(Permutation(100, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_mixes():
    order = list(Permutation(10007, 42, 0))
    half = sum(order[:5003]) / 5003
    assert abs(half - 5003) < 250
    assert sum(abs(a - b) == 1 for a, b in zip(order, order[1:])) < 20


def test_large_sizes_cost_nothing():
    order = Permutation(10**12, 1)
    assert len({order[i] for i in range(1000)}) == 1000


def test_primes():
    sieve = [n for n in range(2, 2000) if all(n % d for d in range(2, int(n**0.5) + 1))]
    assert [n for n in range(2000) if is_prime(n)] == sieve
    assert not is_prime(3215031751) and is_prime(2**61 - 1)


ROWS = [{"query": f"Say {n}", "response": f"{n}!"} for n in range(6)]
PAIRS = [{"query": f"Say {n}", "chosen": f"{n}!", "rejected": "no"} for n in range(6)]


def config_of(path, rows, **settings):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"data_type": "sft", "dataload": "pad", "loss_mask": "file", "ctx_len": 64} | settings
    return DataConfig(path=str(path), tokenizer="bytes", **config)


@pytest.mark.parametrize(
    "rows, data_type, dataload", [(ROWS, "sft", d) for d in ("pad", "pack")] + [(PAIRS, "pairs", "pack")]
)
def test_rows_that_two_files_share_are_counted(tmp_path, rows, data_type, dataload):
    settings = {"data_type": data_type, "dataload": dataload}
    training = build_samples(config_of(tmp_path / "a.jsonl", rows[:4], **settings), 257)
    for held_out, words in ((rows[2:], "2 of 4 held-out rows are training rows too"), (rows[4:], "")):
        config = config_of(tmp_path / f"b{bool(words)}.jsonl", held_out, **settings)
        assert words in "".join(notes := overlap_notes(training, build_samples(config, 257)))
        assert len(notes) == bool(words)


def test_a_row_that_is_there_twice_may_be_on_both_sides_of_a_split(tmp_path):
    training, held_out = split_samples(config_of(tmp_path / "twice.jsonl", ROWS + ROWS), 257, 0.1)
    (note,) = overlap_notes(training, held_out)
    assert note.startswith("note: 1 of 1 held-out row is a training row too")
    training, held_out = split_samples(config_of(tmp_path / "once.jsonl", ROWS), 257, 0.2)
    assert overlap_notes(training, held_out) == []


def test_a_stream_has_no_rows(tmp_path):
    config = config_of(tmp_path / "text.jsonl", [{"text": "one two three " * 20}], dataload="get", ctx_len=16)
    assert overlap_notes(*split_samples(config, 257, 0.2)) == []
