"""Rows with contexts: their layouts, what student and teacher read of them, and which rows are refused."""

import pytest
import torch

from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.batches import EvalBatches, TrainBatches
from rwkv_peft.data.row_forms import in_context
from rwkv_peft.data.show import show_samples
from rwkv_peft.data.sources import build_samples, split_samples
from rwkv_peft.data.tokenizer import BytesTokenizer

TURNS = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
ROW = {"context": "Bo is 3.", "question": "Bo?", "answer": "3"}


@pytest.fixture
def data(answers):
    return answers("contexts")


def text(segments, only=(True, False)):
    return "".join(words for words, counts in segments if counts in only)


@pytest.mark.parametrize(
    "row, names, asked, answer",
    [
        ({"question": "Hi?", "answer": "Yes."}, (), "User: Hi?\n\nAssistant:", " Yes."),
        ({"query": "Hi?", "response": "Yes."}, (), "User: Hi?\n\nAssistant:", " Yes."),
        ({"query": "Hi?", "answer": "Yes."}, (), "User: Hi?\n\nAssistant:", " Yes."),
        ({"question": "Hi?", "answer": "Yes.", "text": "Hi"}, (), "User: Hi?\n\nAssistant:", " Yes."),
        ({"prompt": "Q: Hi?\nA:", "completion": " Yes."}, (), "Q: Hi?\nA:", " Yes."),
        ({"prompt": "Q: Hi?\nA:", "answer": " Yes."}, (), "Q: Hi?\nA:", " Yes."),
        ({"instruction": "Hi?", "output": "Yes."}, (), "Instruction: Hi?\n\nResponse:", " Yes."),
        ({"messages": TURNS}, (), "User: Hi?\n\nAssistant:", " Yes."),
        ({"q": "Hi?", "a": "Yes."}, ("context", "q", "a"), "User: Hi?\n\nAssistant:", " Yes."),
    ],
)
def test_rows_of_all_forms(row, names, asked, answer):
    context, parts = in_context({"context": " It is so.\n", **row}, names)
    assert context == [("It is so.\n\n", False)]
    assert (text(parts), text(parts, [True])) == (asked + answer, answer)


@pytest.mark.parametrize(
    "row, message",
    [
        ("Hi?", "a row is str, not an object with fields: context beside a question"),
        ({"question": "Hi?", "answer": "Yes."}, "field 'context' is missing; the row has question 'Hi\\?', answer"),
        ({"context": "It."}, "a row has the fields context 'It.'; rows with contexts have context beside a question"),
        (
            {"context": "It.", "question": "Hi?"},
            "a row has the fields context 'It.', question 'Hi\\?'; rows with contexts have",
        ),
        ({"context": " ", "question": "Hi?", "answer": "Yes."}, "the context is empty; write one, or leave the row"),
        ({"context": "It.", "question": "Hi?", "answer": " "}, "the answer is empty; write one, or leave the row out"),
        ({"context": "It.", "prompt": "", "completion": "Yes."}, "the question is empty; write one"),
        ({"context": [3], "question": "Hi?", "answer": "Yes."}, "field 'context' holds list, not text"),
        ({"context": "It.", "question": "Hi?", "answer": True}, "field 'answer' holds bool, not text"),
    ],
)
def test_rows_without_what_is_learned_from(row, message):
    with pytest.raises(UserError, match=message):
        in_context(row)


def test_student_and_teacher_count_the_same_tokens(data):
    rows = [ROW | {"context": "Bo is 3. " * n, "question": "Bo?" * n} for n in range(1, 6)]
    samples = build_samples(data(rows, seed=None, ctx_len=100), 257)
    assert len(samples) == 5 and "5 rows with contexts" in samples.notes
    batch = TrainBatches(samples, 3).batch(0, 0)
    read = BytesTokenizer().decode
    theirs = batch["teacher_tokens"][0].tolist()
    begins, their_begins = batch["cu_seqlens"].tolist(), batch["teacher_cu_seqlens"].tolist()
    for n in range(3):
        own = f"User: {rows[n]['question']}\n\nAssistant: 3"
        assert read(batch["tokens"][0, begins[n] : begins[n + 1]].tolist()) == own
        assert read(theirs[their_begins[n] : their_begins[n + 1]]) == f"{rows[n]['context'].strip()}\n\n{own}"
    assert batch["counted"].numel() == sum(map(samples.count, range(3))) == 9  # " 3" and the end of each
    # the token at which each counted one is predicted is the same
    assert torch.equal(batch["tokens"][0, batch["counted"]], batch["teacher_tokens"][0, batch["teacher_counted"]])
    assert "== sample 1, document 2: " in show_samples(samples, 1, BytesTokenizer())


def test_parts_share_no_row_and_what_fills_a_batch_up_counts_nothing(data):
    train, held_out = split_samples(data([ROW] * 10, ctx_len=60), 257, 0.3)
    assert (len(train), len(held_out)) == (7, 3)
    *_, last = EvalBatches(held_out, 2)
    assert last["counted"].numel() == last["teacher_counted"].numel() == held_out.count(2)


def test_a_context_is_never_shortened(data):
    rows = [ROW, ROW | {"context": "Bo is 3. " * 20}]
    size = len("Bo is 3. " * 20) + 1 + len("User: Bo?\n\nAssistant: 3")
    told = f"line 2: the context with its question and answer has {size + 1} tokens, and --ctx_len 64 is the most"
    with pytest.raises(UserError, match=f"contexts.jsonl, {told}; this row needs --ctx_len {size}: "):
        build_samples(data(rows, ctx_len=64), 257)
    assert len(build_samples(data(rows, ctx_len=size), 257)) == 2
    skipped = build_samples(data(rows, ctx_len=64, sft_long="skip"), 257)
    assert len(skipped) == 1 and "1 row too long, left out" in skipped.notes
    left_out = build_samples(data(rows, ctx_len=64, skip_bad_rows=True), 257)
    assert len(left_out) == 1 and "1 bad row left out:" in left_out.notes


def test_thinking_opens_answers(data):
    rows = [ROW, ROW | {"answer": "<think>Hm.</think>3"}]
    samples = build_samples(data(rows, seed=None, sft_think="on", ctx_len=90), 257)
    assert "1 row with thinking, 1 without (<think></think)" in samples.notes
    assert not any("without an answer" in note or "empty" in note for note in samples.notes)
