"""Samples: every token or document once an epoch, in an order that the seed draws."""

import random
from collections import Counter

import pytest
import torch

from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import DataConfig
from rwkv_peft.data import samples as module
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.data.sources import build_samples


@pytest.fixture
def make(tmp_path):
    """make(documents, **settings) -> samples over these documents."""

    def build(documents, vocab_size=65536, masks=None, **settings):
        with ShardWriter(tmp_path / "data") as writer:
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


@pytest.mark.parametrize("stretch", [1, 40, 1 << 14])
@pytest.mark.parametrize("mask", ["file", "qa"])
def test_answers_behind_the_cut_are_counted_wherever_documents_lie(make, monkeypatch, stretch, mask):
    monkeypatch.setattr(module, "STRETCH", stretch)
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
