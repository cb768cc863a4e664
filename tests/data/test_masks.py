"""Masks count exactly the tokens of the answers, wherever a window begins."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import DataConfig
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.data.masks import describe_mask, make_mask
from rwkv_peft.data.recorded import default_mask
from rwkv_peft.data.token_file_writer import TokenFileWriter


def dataset_of(folder, documents, masks=None):
    with TokenFileWriter(folder / "data") as writer:
        for i, document in enumerate(documents):
            writer.add(document, None if masks is None else masks[i])
    return BinidxDataset(folder / "data")


def config(**settings):
    return DataConfig(path="data", **settings)


def by_hand(document, begin, end, end_counts):
    """The mask by its rule, one token at a time."""
    counted, on = [], False
    for i in range(len(document)):
        before = document[:i]
        if end and end_counts and before[-len(end) :] == end:
            on = False
        if end and not end_counts and document[i : i + len(end)] == end:
            on = False
        if len(before) >= len(begin) and before[-len(begin) :] == begin:
            on = True
        counted.append(on)
    return counted


@given(
    st.lists(st.lists(st.integers(1, 4), max_size=12), min_size=1, max_size=6),
    st.integers(0, 40),
    st.integers(0, 40),
    st.sampled_from([[3], [3, 4], [1, 2], [4, 3, 2]]),
    st.booleans(),
)
@settings(max_examples=160, deadline=None)
def test_marker_masks_follow_the_rule_from_any_start(tmp_path_factory, documents, start, length, end, closes):
    documents = [[1, 2], *documents]  # the marker occurs
    dataset = dataset_of(tmp_path_factory.mktemp("mask"), documents)
    kind = "se" if closes else "qa"
    mask = make_mask(dataset, config(loss_mask=kind, mask_id=(1, 2), mask_end_id=tuple(end)))
    expected = sum((by_hand(document, [1, 2], end, closes) for document in documents), [])
    start = min(start, len(expected) - 1)
    stop = min(start + length, len(expected))
    assert mask(start, stop).tolist() == expected[start:stop]


def test_qa_counts_each_answer_of_a_conversation(tmp_path):
    #                               Q  .  A  .  .  Q  .  A  .  end
    dataset = dataset_of(tmp_path, [[8, 5, 9, 6, 7, 8, 5, 9, 6, 0]])
    turns = make_mask(dataset, config(loss_mask="qa", mask_id=(9,), mask_end_id=(8,)))
    assert turns(0, 10).tolist() == [bool(i) for i in (0, 0, 0, 1, 1, 0, 0, 0, 1, 1)]
    longer = make_mask(dataset, config(loss_mask="qa", mask_id=(9,), mask_end_id=(8, 5)))
    assert longer(0, 6).tolist() == turns(0, 6).tolist()  # also where the window ends inside the marker
    to_the_end = make_mask(dataset, config(loss_mask="qa", mask_id=(9,)))
    assert to_the_end(0, 10).tolist() == [False] * 3 + [True] * 7


def test_file_reads_the_companion(tmp_path):
    dataset = dataset_of(tmp_path, [[1, 2, 3], [4, 5]], [[0, 1, 1], [0, 1]])
    assert make_mask(dataset, config(loss_mask="file"))(1, 5).tolist() == [True, True, False, True]


def test_a_mask_that_is_there_is_used_unless_another_is_named(tmp_path):
    dataset = dataset_of(tmp_path, [[1, 2, 3], [4, 5]], [[0, 1, 1], [0, 1]])
    assert default_mask(tmp_path / "data") == default_mask(tmp_path / "data.bin") == "file"
    assert default_mask(tmp_path / "other") == "none"
    assert describe_mask(dataset, config(loss_mask="file")) == "loss on 3 of 5 tokens (answers)"
    assert "all 5 tokens: --loss_mask none leaves" in describe_mask(dataset, config())
    assert "after --mask_id 7 (--loss_mask qa)" in describe_mask(dataset, config(loss_mask="qa", mask_id=(7,)))


def test_a_mask_that_counts_nothing_is_refused(tmp_path):
    dataset = dataset_of(tmp_path, [[1, 2, 3]], [[0, 0, 0]])
    with pytest.raises(UserError, match=r"data\.mask counts none of 3 tokens"):
        describe_mask(dataset, config(loss_mask="file"))


def test_none_and_pad_count_everything(tmp_path):
    dataset = dataset_of(tmp_path, [[1, 2]])
    assert make_mask(dataset, config()) is None
    assert make_mask(dataset, config(loss_mask="pad")) is None


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(loss_mask="file"), r"data\.mask does not exist"),
        (dict(loss_mask="qa", mask_id=(2, 1)), "--mask_id 2 1: these token ids never occur"),
    ],
)
def test_what_is_missing_is_named(tmp_path, settings, message):
    dataset = dataset_of(tmp_path, [[1, 2], [1]])
    with pytest.raises(UserError, match=message):
        make_mask(dataset, config(**settings))
