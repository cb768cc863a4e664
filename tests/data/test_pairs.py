"""Rows of two answers: their layouts, which tokens count, and which rows are left out."""

import pytest

from data.documents import EARLIER, GOOD, USER, counted, text
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.batches import EvalBatches, TrainBatches
from rwkv_peft.data.row_forms import pair
from rwkv_peft.data.show import show_samples
from rwkv_peft.data.sources import build_samples, split_samples
from rwkv_peft.data.tokenizer import BytesTokenizer

BAD = {"role": "assistant", "content": "No."}
PROMPT, ANSWERS = "User: Hi?\n\nAssistant:", (" Yes.", " No.")
LONGER = f"User: A?\n\nAssistant: B.\n\n{PROMPT}"


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"query": "Hi?", "chosen": "Yes.", "rejected": "No."}, PROMPT),
        ({"question": "Hi?", "chosen": "Yes.", "rejected": "No.", "system": ""}, PROMPT),
        ({"instruction": "Hi?", "input": "x", "chosen": "Yes.", "rejected": "No."}, None),
        ({"prompt": PROMPT, "chosen": " Yes.", "rejected": " No."}, PROMPT),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, PROMPT),
        ({"prompt": "Hi?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, PROMPT),
        ({"prompt": "Hi?", "chosen": [GOOD], "rejected": [BAD]}, PROMPT),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, PROMPT),
        ({"prompt": "Hi?", "messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, PROMPT),
        ({"messages": [USER], "chosen": "Yes.", "rejected": "No."}, PROMPT),
        ({"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}, PROMPT),
        ({"prompt": "Hi?", "preferred_output": [GOOD], "non_preferred_output": [BAD]}, PROMPT),
        ({"chosen_messages": [USER, GOOD], "rejected_messages": [USER, BAD]}, PROMPT),
        ({"conversation": [{"human": "A?", "assistant": "B."}, USER], "chosen": "Yes.", "rejected": "No."}, LONGER),
        (
            {
                "conversations": [{"from": "human", "value": "Hi?"}],
                "chosen": {"from": "gpt", "value": "Yes."},
                "rejected": {"from": "gpt", "value": "No."},
            },
            PROMPT,
        ),
        (
            {
                "chosen": "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: Hi?\n\nAssistant: Yes.",
                "rejected": "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: Hi?\n\nAssistant: No.",
            },
            LONGER,
        ),
    ],
)
def test_rows_of_all_forms(row, prompt):
    prompt = prompt or "Instruction: Hi?\n\nInput: x\n\nResponse:"
    for segments, answer in zip(pair(row), ANSWERS):
        assert (text(segments), counted(segments)) == (prompt + answer, answer)


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "row, names",
    [
        ({"question": "Hi?", "chosen": "Yes.", "rejected": "No.", "system": "Be brief."}, ()),
        ({"instruction": "Hi?", "chosen": "Yes.", "rejected": "No.", "system": "Be brief."}, ()),
        ({"prompt": "Hi?", "chosen": [GOOD], "rejected": [BAD], "system_prompt": "Be brief."}, ()),
        ({"messages": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD], "system": "Be brief."}, ()),
        (
            {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", "system": "Be brief."},
            ("prompt", "chosen", "rejected"),
        ),
    ],
)
def test_a_system_text_beside_a_question_stands_before_it(row, names):
    for segments, answer in zip(pair(row, names), ANSWERS):
        assert text(segments).startswith("System: Be brief.\n\n") and text(segments).count("Be brief.") == 1
        assert text(segments).endswith(answer) and counted(segments) == answer


def test_turns_that_both_share_do_not_count():
    for segments, answer in zip(pair({"messages": [*EARLIER, USER], "chosen": [GOOD], "rejected": [BAD]}), ANSWERS):
        assert text(segments) == f"User: A?\n\nAssistant: B.\n\n{PROMPT}{answer}"
        assert counted(segments).endswith(answer) and "B." not in counted(segments)


def test_named_fields_and_thinking():
    row = {"q": "Hi?", "a": "Yes.", "b": "No."}
    assert [text(segments) for segments in pair(row, ("q", "b", "a"))] == [PROMPT + ANSWERS[1], PROMPT + ANSWERS[0]]
    thought = pair(row, ("q", "a", "b"), think="off")
    assert [text(segments) for segments in thought] == [f"{PROMPT} <think></think>\n{a.strip()}" for a in ANSWERS]


def test_both_answer_the_same_prompt_where_one_of_them_thinks(data):
    rows = [
        {"query": "Hi?", "chosen": "<think>Hm.</think>Yes.", "rejected": no} for no in ("No.", "<think>-</think>No.")
    ]
    samples = build_samples(data(rows, seed=None, sft_think="on"), 257)
    assert "1 row with thinking, 1 without (<think></think)" in samples.notes
    openings = [[BytesTokenizer().decode(one[0].tolist()).split("[")[0] for one in samples[n]] for n in range(2)]
    assert all(" <think></think>\n" in one for one in openings[0]) and all(
        "<think>\n" not in one for one in openings[0]
    )
    assert "<think>Hm.</think>" in openings[1][0] and "<think>-</think>" in openings[1][1]


@pytest.mark.parametrize(
    "row, words",
    [
        ([1], "a row is list, not an object"),
        (
            {"prompt": "Hi?", "chosen": "Yes."},
            "a row has the fields prompt 'Hi\\?', chosen 'Yes.'; pairs are chosen and rejected",
        ),
        ({"chosen": "Yes.", "rejected": "No."}, "a row has no prompt, only chosen 'Yes.', rejected 'No.'"),
        ({"prompt": [USER], "chosen": True, "rejected": "No."}, "field 'chosen' holds bool, not text"),
        ({"query": "Hi?", "chosen": "Yes.", "rejected": None}, "field 'rejected' holds NoneType, not text"),
        ({"query": "Hi?", "response": "Yes."}, "rows of one answer are for --data_type sft"),
        (
            {"messages": [USER, GOOD], "chosen": "Yes.", "rejected": "No."},
            "end in one of the assistant's; leave it out",
        ),
        ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", "system": "Be."}, "a system text beside its prompt"),
        ({"query": {}, "chosen": "Yes.", "rejected": "No."}, "field 'query' holds dict, not text"),
    ],
)
def test_rows_that_are_no_pairs(row, words):
    with pytest.raises(UserError, match=words):
        pair(row)


@pytest.fixture
def data(answers):
    return answers("pairs")


def rows(number):
    return [{"prompt": f"{i}?", "chosen": f"{i} is fine", "rejected": "no" * (i + 1)} for i in range(number)]


def words(document):
    tokens, mask = document
    return BytesTokenizer().decode([int(token) for token, counts in zip(tokens[1:], mask) if counts])


def test_samples_are_pairs_whose_answers_count(data):
    samples = build_samples(data(rows(5), seed=None), 257)
    assert len(samples) == 5 and samples.count(3) == 1 and "5 pairs of answers" in samples.notes
    for n in range(5):
        assert [words(document) for document in samples[n]] == [f"{n} is fine", "no" * (n + 1)]
    assert "sample 1, document 2" in show_samples(samples, 1, BytesTokenizer())
    train, held_out = split_samples(data(rows(5)), 257, 0.4)
    shown = [words(part[n][0]) for part in (train, held_out) for n in range(len(part))]
    assert sorted(shown) == [f"{n} is fine" for n in range(5)] and len(held_out) == 2


def test_a_batch_is_one_row_of_pairs_and_a_step_counts_them(data):
    samples = build_samples(data(rows(5)), 257)
    batch = next(iter(TrainBatches(samples, micro_bsz=2, accumulate=2, read_ahead=0)))
    assert batch["tokens"].shape[0] == 1 and len(batch["cu_seqlens"]) == 5 and batch["step_count"] == 4
    *_, last = EvalBatches(samples, 2)
    assert len(last["cu_seqlens"]) == 5, "of which the last two fill up"


def test_both_lose_the_same_front_of_a_prompt_that_is_too_long(data):
    row = {"prompt": "0123456789", "chosen": "ab", "rejected": "abcdef"}
    config = data([row], ctx_len=9)
    (better, _), (worse, _) = build_samples(config, 257)[0]
    assert [BytesTokenizer().decode(part.tolist()[:-1]) for part in (better, worse)] == ["789ab", "789abcdef"]
    with pytest.raises(UserError, match="no document to write"):
        build_samples(data([row], ctx_len=9, sft_long="skip"), 257)


def test_pairs_of_equal_answers_are_left_out_and_counted(data):
    equal = [{"prompt": "?", "chosen": "a", "rejected": "a"}, {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}]
    samples = build_samples(data([*rows(3), *equal]), 257)
    assert len(samples) == 3 and "2 pairs of equal answers left out" in samples.notes


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"prompt": "", "chosen": "a", "rejected": ""},
        {"query": "Hi?", "chosen": "", "rejected": "b"},
        {"query": "Hi?", "chosen": "", "rejected": ""},
        {"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
    ],
)
def test_pairs_without_a_prompt_or_an_answer_are_left_out_and_counted(data, row):
    samples = build_samples(data([*rows(3), row]), 257)
    assert len(samples) == 3 and "1 row without a prompt or an answer, left out" in samples.notes
    with pytest.raises(UserError, match="no document to write: 1 row without a prompt"):
        build_samples(data([row]), 257)


def test_rows_of_two_answers_name_the_data_type_that_reads_them(data):
    with pytest.raises(UserError, match="--data_type pairs"):
        build_samples(data(rows(2), data_type="sft", dataload="pad"), 257)
    with pytest.raises(UserError, match="give --data_type sft, or pairs"):
        build_samples(data(rows(2), data_type="binidx", dataload="get", tokenizer="world"), 257)


def test_fields_of_pairs_are_three(data):
    with pytest.raises(UserError, match="pairs have three fields"):
        build_samples(data(rows(2), sft_field=("prompt", "chosen")), 257)
    assert len(build_samples(data(rows(2), sft_field=("prompt", "rejected", "chosen")), 257)) == 2
