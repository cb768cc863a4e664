"""Rows of segments, turns that do not count, and rows that weigh more or less than others."""

import json

import numpy as np
import pytest
import torch

from data.documents import texts
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.batches import EvalBatches, TrainBatches
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.data.layouts import RowLayout
from rwkv_peft.data.preprocess import main
from rwkv_peft.data.samples import collate
from rwkv_peft.data.sources import build_samples
from rwkv_peft.data.token_file_writer import TokenFileWriter

SEGMENTS = [{"text": "a", "train": False}, {"text": "b c", "train": True}, {"text": "d", "train": False}]


def turns(*more):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": word, **fields} for n, (word, fields) in enumerate(more)]}


def test_segments_are_laid_out_as_they_stand(preprocess):
    assert texts(preprocess([{"segments": SEGMENTS}])) == [("abcd".replace("bc", "b c"), "b c")]
    assert texts(preprocess([{"segments": SEGMENTS[:2]}, {"segments": SEGMENTS}]))[0] == ("ab c", "b c")
    axolotl = [{"text": part["text"], "label": part["train"]} for part in SEGMENTS]
    assert RowLayout().segments({"segments": axolotl}) == RowLayout().segments({"segments": SEGMENTS})


@pytest.mark.parametrize(
    "off",
    [
        {"weight": 0},
        {"train": False},
        {"weight": 0.0, "train": True},
        {"training": False},
        {"loss": False},
        {"loss_weight": 0.0},
    ],
)
def test_a_turn_that_does_not_count_leaves_the_same_text(off):
    whole = RowLayout().segments(turns(("Q", {}), ("A", {"weight": 1}), ("R", {"weight": 0}), ("B", {"train": True})))
    part = RowLayout().segments(turns(("Q", {}), ("A", off), ("R", {}), ("B", {})))
    assert [text for text, _ in part] == [text for text, _ in whole]
    assert [text for text, counts in whole if counts] == [" A", "\n\n", "User:", " B"]
    assert [text for text, counts in part if counts] == [" B"]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"segments": []}, "segments must be a list"),
        ({"segments": [{"text": "a"}]}, "a segment is .*; it needs a text, and train, true or false"),
        ({"segments": [{"text": None, "train": True}]}, "field 'text' holds null, not text"),
        ({"segments": SEGMENTS, "text": "a"}, "a row has a text, which counts as a whole, and segments"),
        ({"segments": SEGMENTS, "tools": [{"name": "f"}]}, "field 'tools' has no place in this layout"),
        (turns(("Q", {}), ("A", {"weight": 0.5})), "field 'weight' of a turn holds 0.5; 0 leaves its words out"),
        (turns(("Q", {}), ("A", {"train": "yes"})), "field 'train' of a turn holds 'yes'"),
        (turns(("Q", {}), ("A", {"train_detail": [{"begin_offset": 0}]})), "field 'train_detail' of a turn is not"),
        (turns(("Q", {}), ("A", {"masked": True})), "field 'masked' of a turn is not followed; .* rows of segments"),
        (turns(("Q", {}), ("A", {}), ("R", {}), ("B", {"loss_weight": 2})), "answers of a row .* loss_weight 1 and 2;"),
        (turns(("Q", {}), ("A", {"loss_weight": -1})), "field 'loss_weight' holds -1; a row's weight in the loss is"),
        ({"text": "a", "weight": -1}, "field 'weight' holds -1; a row's weight in the loss is a number from 0 on"),
        ({"text": "a", "weight": "much"}, "field 'weight' holds 'much'; a row's"),
        ({"text": "a", "weight": True}, "field 'weight' holds True; a row's"),
        ({"text": "a", "weight": 10**400}, "field 'weight' holds 1000"),
        ({"text": "a", "weight": float("nan")}, "field 'weight' holds nan; a row's"),
    ],
)
def test_what_says_nothing_is_a_bad_row(preprocess, row, message):
    with pytest.raises(UserError, match=f"line 2: {message}"):
        preprocess([{"text": "a"}, row])


@pytest.mark.parametrize(
    "data_type, row",
    [
        ("pairs", {"prompt": "Q", "chosen": "A", "rejected": "B"}),
        ("labels", {"prompt": "Q", "completion": "A", "label": True}),
    ],
)
def test_rows_whose_loss_has_no_weights_refuse_them(answers, data_type, row):
    make = answers(data_type)
    assert len(build_samples(make([row | {"weight": 1}] * 2, ctx_len=512), 257)) == 2
    with pytest.raises(UserError, match="'weight' holds 2, and only rows of --data_type sft weigh in the loss"):
        build_samples(make([row | {"weight": 2}] * 2), 257)


WEIGHED = [{"query": "a" * n, "response": "b" * n, "weight": n / 2} for n in range(6)]


@pytest.mark.parametrize("dataload", ["pad", "only", "pack", "get"])
@pytest.mark.parametrize("loss_mask", ["file", "none"])
def test_each_target_weighs_what_its_row_does(answers, dataload, loss_mask):
    samples = build_samples(answers("sft")(WEIGHED, dataload=dataload, ctx_len=40, loss_mask=loss_mask, seed=None), 257)
    dataset = samples.dataset
    expected = np.repeat(np.arange(6) / 2, dataset.sizes)
    expected *= 1 if loss_mask == "none" else dataset.mask
    if dataload != "get":  # which joins documents, so that a first token is a target
        expected[[dataset.start(n) for n in range(len(dataset))]] = 0
    assert dataset.weights.tolist() == [row["weight"] for row in WEIGHED]
    assert "rows weigh 0 to 2.5; the loss is the mean by weight" in samples.notes
    assert sum(map(samples.count, range(len(samples)))) == pytest.approx(expected[1:].sum(), rel=1e-6)
    rows = 1 if dataload == "only" else 2
    batches = TrainBatches(samples, rows, accumulate=3)
    parts = [batches.batch(0, number) for number in range(3)]
    assert batches.step_count(0) == pytest.approx(sum(part["weights"].double().sum().item() for part in parts))
    for part in (*parts, *EvalBatches(samples, rows)):
        assert torch.equal(part["mask"], part["weights"] != 0)
        assert torch.equal(part["weights"].flatten()[part["counted"]], part["weights"][part["mask"]])


def test_a_mixture_weighs_only_the_rows_of_files_that_do():
    plain, weighed = (torch.arange(4), torch.tensor([True, False, True])), (torch.arange(3), torch.tensor([0.0, 2.0]))
    for rows in ([plain, weighed], [weighed, plain]):
        batch = collate(rows)
        assert sorted(batch["weights"].sum(1).tolist()) == [2, 2] and batch["mask"].sum() == 3
        assert collate([rows])["weights"][0].sum() == 4
    assert "weights" not in collate([plain, plain])


def test_weights_stay_with_their_documents(preprocess):
    rows = [{"text": chr(97 + n), "weight": "" if n == 1 else str(n)} for n in range(5)]
    dataset = preprocess(rows)
    assert len(dataset) == 5
    assert all(ord(text[0]) - 97 == weight for (text, _), weight in zip(texts(dataset), dataset.weights))


def test_answers_share_a_loss_weight(preprocess):
    weights = [
        ({}, {}),
        ({"loss_weight": 1.0}, {}),
        ({"loss_weight": 0.5},) * 2,
        ({"loss_weight": 0}, {"loss_weight": 3}),
    ]
    rows = [
        turns(("Q", {"loss_weight": 9}), (f"{n}", one), ("R", {}), ("B", two)) for n, (one, two) in enumerate(weights)
    ]
    dataset = preprocess([*rows, rows[2] | {"weight": 4}])
    found = dict.fromkeys(counted.split("\n")[0] for _, counted in texts(dataset))
    assert list(dataset.weights) == [1, 1, 0.5, 3, 2] and list(found) == [" 0", " 1", " 2", " B"]


def test_a_template_reads_only_what_it_names(preprocess, tmp_path):
    (tmp_path / "template.txt").write_text("{text}{weight}")
    dataset = preprocess([{"text": "a", "weight": " kg"}], "--template", str(tmp_path / "template.txt"))
    assert texts(dataset)[0][0] == "a kg" and dataset.weights is None


def test_weights_of_one_are_not_kept_and_old_ones_go(tmp_path):
    rows = tmp_path / "rows.jsonl"
    for weights, kept in (((1, 2), True), ((1, 1), False)):
        rows.write_text("".join(json.dumps({"text": "ab", "weight": weight}) + "\n" for weight in weights))
        assert main([str(rows), "--output", str(tmp_path / "data"), "--tokenizer", "bytes", "--overwrite"]) == 0
        assert (tmp_path / "data.weights").exists() == kept
        assert (BinidxDataset(tmp_path / "data").weights is not None) == kept


@pytest.mark.parametrize(
    "content, message",
    [
        (b"1234", "4 bytes, but .* holds 3 tokens in 2 documents, and a weight of 4 bytes is due for each document"),
        (np.array([1, np.nan], "<f4").tobytes(), "holds a weight that is negative or no number"),
        (np.array([1, -1], "<f4").tobytes(), "holds a weight that is negative or no number"),
    ],
)
def test_damaged_weights_are_refused(tmp_path, content, message):
    with TokenFileWriter(tmp_path / "data") as writer:
        writer.add([0])
        writer.add([1, 2])
    (tmp_path / "data.weights").write_bytes(content)
    with pytest.raises(UserError, match=message):
        BinidxDataset(tmp_path / "data")
