"""Rows of one answer with a label: their layouts, what of them counts, and the answers of other rows beside them."""

import pytest
import torch

from data.documents import EARLIER, GOOD, USER, counted, text
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.batches import EvalBatches, TrainBatches
from rwkv_peft.data.row_forms import label_of, labelled
from rwkv_peft.data.show import show_samples
from rwkv_peft.data.sources import build_samples, split_samples
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.evals.questions import rows_of

PROMPT = "User: Hi?\n\nAssistant:"


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"query": "Hi?", "response": "Yes."}, PROMPT),
        ({"question": "Hi?", "answer": "Yes."}, PROMPT),
        ({"prompt": PROMPT, "completion": " Yes."}, PROMPT),
        ({"instruction": "Hi?", "output": "Yes."}, "Instruction: Hi?\n\nResponse:"),
        ({"prompt": [USER], "completion": [GOOD]}, PROMPT),
        ({"prompt": "Hi?", "completion": [GOOD]}, PROMPT),
        ({"messages": [USER], "completion": "Yes."}, PROMPT),
        ({"messages": [USER, GOOD]}, PROMPT),
        ({"conversations": [USER, GOOD], "system": "Be brief."}, f"System: Be brief.\n\n{PROMPT}"),
        ({"messages": [*EARLIER, USER, GOOD]}, f"User: A?\n\nAssistant: B.\n\n{PROMPT}"),
        ({"prompt": [*EARLIER, USER], "completion": [GOOD]}, f"User: A?\n\nAssistant: B.\n\n{PROMPT}"),
    ],
)
def test_rows_of_all_forms(row, prompt):
    segments = labelled(row | {"label": True})
    assert (text(segments), counted(segments)) == (f"{prompt} Yes.", " Yes.")


def test_named_fields_and_thinking():
    row, names = {"q": "Hi?", "a": "Yes.", "good": False}, ("q", "a", "good")
    assert text(labelled(row, names)) == f"{PROMPT} Yes." and label_of(row, names) is False
    assert text(labelled(row, names, think="off")) == f"{PROMPT} <think></think>\nYes."


@pytest.fixture
def data(answers):
    return answers("labels")


def rows(number):
    return [{"prompt": f"{i}?", "completion": "yn"[i % 2] * (i + 1), "label": i % 2 == 0} for i in range(number)]


@pytest.mark.parametrize(
    "row, words",
    [
        ([1], "a row is list, not an object"),
        (
            {"query": "Hi?", "response": "Yes."},
            "rows without a label are for --data_type sft; name yours, as --sft_field PROMPT ANSWER LABEL",
        ),
        ({"query": "Hi?", "response": "Yes.", "label": 1}, "field 'label' holds 1; a label is true for a desirable"),
        ({"query": "Hi?", "response": "Yes.", "label": "yes"}, "field 'label' holds 'yes'; a label is true"),
        ({"query": "Hi?", "label": True}, "a row has the fields query"),
        ({"query": "Hi?", "response": ["a"], "label": True}, "field 'response' holds list, not text"),
        ({"messages": [USER], "label": True}, "are to end in one of the assistant's"),
        ({"messages": [USER, GOOD, USER], "label": True}, "are to end in one of the assistant's"),
        ({"messages": [], "label": True}, "are to end in one of the assistant's"),
    ],
)
def test_rows_that_have_no_label_or_answer_are_refused_or_left_out(data, row, words):
    with pytest.raises(UserError, match=f"line 4: .*{words}"):
        build_samples(data([*rows(3), row]), 257)
    samples = build_samples(data([*rows(3), row], skip_bad_rows=True), 257)
    assert len(samples) == 3 and any("1 bad row left out" in note for note in samples.notes)


@pytest.mark.parametrize("row", [{"prompt": "", "completion": "a"}, {"query": "Hi?", "response": ""}])
def test_rows_without_a_prompt_or_an_answer_are_left_out_and_counted(data, row):
    samples = build_samples(data([*rows(3), row | {"label": True}]), 257)
    assert len(samples) == 3 and "1 row without a prompt or an answer, left out" in samples.notes


def words(document):
    """(the prompt, what counts) of a document, in words."""
    tokens, mask = document
    first = int(mask.nonzero()[0]) + 1
    return tuple(BytesTokenizer().decode(part.tolist()).rstrip("\0") for part in (tokens[:first], tokens[first:-1]))


def test_each_row_stands_beside_its_prompt_with_the_next_rows_answer(data):
    samples = build_samples(data(rows(4), seed=None), 257)
    assert len(samples) == 4 and samples.count(3) == 1 and "4 labelled answers" in samples.notes
    answers = ["y", "nn", "yyy", "nnnn"]
    for n in range(8):
        own, mismatched = samples[n]
        assert words(own) == (f"{n % 4}?", answers[n % 4]) and words(mismatched) == (f"{n % 4}?", answers[(n + 1) % 4])
        assert own[1].max() == 1 + n % 2, "1 desirable, 2 undesirable"
    shuffled = build_samples(data(rows(4)), 257)
    assert all(words(own)[1] != words(other)[1] for own, other in (shuffled[n] for n in range(40)))
    shown = show_samples(samples, 2, BytesTokenizer())
    assert "sample 1, document 1: 4 tokens, 2 count" in shown and "sample 2, document 1, undesirable: 5 tokens" in shown


def test_a_batch_tells_labels(data):
    samples = build_samples(data(rows(5), seed=None), 257)
    batch = next(iter(TrainBatches(samples, micro_bsz=2, accumulate=2, read_ahead=0)))
    assert batch["tokens"].shape[0] == 1 and len(batch["cu_seqlens"]) == 5 and batch["step_count"] == 4
    assert batch["labels"].tolist() == [True, False, False, True]  # a mismatched answer has its own row's
    assert batch["mask"].dtype == torch.bool and batch["mask"].sum() == 2 + 3 + 3 + 4
    *_, last = EvalBatches(samples, 2)
    assert len(last["cu_seqlens"]) == 5 and last["mask"].sum() == 6 + 2, "the last two fill up"


def test_a_prompt_too_long_for_anothers_answer_loses_its_front(data):
    long = [{"prompt": "0123456", "completion": "a"}, {"prompt": "?", "completion": "bcdefgh"}]
    samples = build_samples(data([row | {"label": True} for row in long], ctx_len=8, seed=None), 257)
    assert words(samples[0][1]) == ("6", "bcdefgh") and words(samples[1][1]) == ("?", "a")
    assert all(len(mask) <= 8 for n in range(2) for _, mask in samples[n])


def test_one_row_has_no_other_beside_it(data):
    with pytest.raises(UserError, match="there is only 1 row here; take 2 or more"):
        build_samples(data(rows(1)), 257)
    with pytest.raises(UserError, match="there is only 1 row here; take 2 or more"):
        split_samples(data(rows(4)), 257, 0.25)


def test_a_split_keeps_its_notes(data):
    train, held_out = split_samples(data(rows(6)), 257, 0.5)
    assert len(train) == len(held_out) == 3 and any("tokens (answers)" in note for note in train.notes)
    assert "6 labelled answers" in train.notes and not any("document" in note for note in train.notes)


def test_undesirable_answers_are_no_rows_to_compare_with(data):
    found = rows_of("training", build_samples(data(rows(4), seed=None), 257), 4)
    assert [BytesTokenizer().decode(list(row.answer[:-1])) for row in found] == ["y", "yyy"]


def test_fields_of_labels_are_three(data):
    with pytest.raises(UserError, match="labelled rows have three fields, the prompt, its answer and the label"):
        build_samples(data(rows(2), sft_field=("prompt", "completion")), 257)
    assert len(build_samples(data(rows(2), sft_field=("prompt", "completion", "label")), 257)) == 2
