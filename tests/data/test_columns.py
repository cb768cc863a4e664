"""Rows of no known form are read by words for questions and answers, once a file; what may be misread is refused."""

import re

import pytest

from data.documents import texts
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.encoding import EncodeSettings
from rwkv_peft.data.overview import overview
from rwkv_peft.data.sources import build_samples

QA = "User: Q\n\nAssistant: A"


@pytest.mark.parametrize(
    "row",
    [
        *({"prompt": "Q", "response": "A"}, {"instruction": "Q", "response": "A"}, {"input": "Q", "output": "A"}),
        *({"q": "Q", "a": "A"}, {"user": "Q", "assistant": "A"}, {"Question": "Q", "Answer": "A"}),
        *({"problem": "Q", "solution": "A"}, {"Prompt ": "Q", "Com_pletion": "A"}, {"human": "Q", "bot": "A"}),
        *({"问题": "Q", "答案": "A"}, {"指令": "Q", "回答": "A"}, {"prompt": "Q", "target": "A", "id": 7}),
        *({"inputs": "Q", "targets": "A"}, {"User Question": "Q", "Bot Answer": "A"}, {"post": "Q", "reply": "A"}),
    ],
)
def test_a_question_and_an_answer_are_found_by_their_words(preprocess, capsys, row):
    rows = [row, {name: str(value).lower() for name, value in row.items()}]
    assert texts(preprocess(rows))[0][0].replace("QA", QA) == QA
    note = next((line for line in capsys.readouterr().out.splitlines() if line.startswith("note: read")), "")
    names = [name for name in row if name != "id"]
    if names != ["Prompt ", "Com_pletion"]:
        assert all(f"{name} as the" in note for name in names) and "the first row: User: Q\\n\\nAssistant: A" in note


def test_a_system_text_a_context_and_an_input_stand_with_the_question(preprocess):
    row = {"Instruction": "Q", "input": "I", "context": "C", "system_prompt": "S", "response": "A"}
    assert texts(preprocess([row])) == [("System: S\n\nUser: C\nQ\nI\n\nAssistant: A", " A")]


@pytest.mark.parametrize("name", ["Complex_CoT", "thinking", "cot", "reasoning_content"])
def test_thinking_is_laid_out_by_think(preprocess, name):
    row = {"Question": "Q", name: "Hm.", "Response": "A"}
    (document,) = texts(preprocess([row], "--think", "on"))
    assert document[0] == "User: Q\n\nAssistant: <think>\nHm.\n</think>\nA"


@pytest.mark.parametrize("answer, text", [(3, "3"), (2.5, "2.5"), (True, "true"), (False, "false")])
def test_numbers_and_booleans_are_answers(preprocess, answer, text):
    assert texts(preprocess([{"prompt": "Q", "response": answer}])) == [(f"User: Q\n\nAssistant: {text}", f" {text}")]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"problem": "P", "solution": "S", "answer": "7"}, "solution or answer may be the answer"),
        ({"prompt": "P", "user": "S", "response": "7"}, "prompt or user may be the question"),
        *(
            ({"prompt": "P", "response": "S", name: 0}, f"{name}, by which the answer may be a bad one")
            for name in ("label", "score", "rating", "is_correct")
        ),
        (
            {"prompt": "P", "response": 2, "candidates": ["a", "b"]},
            "a number, beside candidates, in which it may count",
        ),
        ({"text": "Write it.", "code": "f()"}, "a text and a code, and the text alone would be learned"),
        ({"Question": "Q", "question": "R", "response": "A"}, "Question or question may be the question"),
    ],
)
def test_what_may_be_misread_is_refused_and_every_choice_of_the_message_works(preprocess, row, message):
    with pytest.raises(UserError, match=message) as refused:
        preprocess([row])
    choices = re.findall(r"--fields (\S+(?: \S+)?)(?= or --|$)", str(refused.value))
    assert choices
    for choice in choices:
        assert texts(preprocess([row], "--fields", *choice.split()))


@pytest.mark.parametrize(
    "row",
    [{"q": "Q", "a": "A", "b": "B", "c": "C"}, {"prompt": "Q", "response": ["A"]}, {"a": "A", "b": "B"}, {"q": "Q"}],
)
def test_letters_among_letters_and_lists_are_no_answers(preprocess, row):
    with pytest.raises(UserError):
        preprocess([row])


def test_a_file_is_decided_once(preprocess):
    with pytest.raises(UserError, match="line 101: .* prompt is to be its question, as in the first rows"):
        preprocess([{"prompt": "Q", "response": "A"}] * 100 + [{"user": "Q", "bot": "A"}])


LINES = "Q\nA. w\nB. x\nC. y"


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q", "subject": "s", "choices": ["w", "x", "y"], "answer": 1},  # MMLU
        {"question": "Q", "choices": {"text": ["w", "x", "y"], "label": ["A", "B", "C"]}, "answerKey": "B"},  # ARC
        {"id": 0, "question": "Q", "A": "w", "B": "x", "C": "y", "answer": "B"},  # C-Eval
        {"Question": "Q", "A": "w", "B": "x", "C": "y", "Answer": "B"},  # CMMLU
        {"question": "Q", "opa": "w", "opb": "x", "opc": "y", "cop": 1},  # MedMCQA
        {"question": "Q", "options": {"A": "w", "B": "x", "C": "y"}, "answer": "x", "answer_idx": "B"},  # MedQA
        {"question": "Q", "options": ["A)w", "B)x", "C)y"], "rationale": "x is.", "correct": "B"},  # AQuA
        {"prompt": "Q", "options": ["w", "x", "y"], "answer": "B"},
    ],
)
def test_choices_stay_with_their_question(preprocess, row):
    assert texts(preprocess([row])) == [(f"User: {LINES}\n\nAssistant: B. x", " B. x")]


@pytest.mark.parametrize(
    "more, message",
    [
        ({"answer": 3}, "counts the choices from 1"),
        ({}, "no field that names the right one"),
        ({"answer": "none of them"}, "no field that names the right one"),
    ],
)
def test_choices_without_a_right_one_are_refused(preprocess, more, message):
    with pytest.raises(UserError, match=message):
        preprocess([{"question": "Q", "choices": ["w", "x", "y"]} | more])


def test_choices_without_a_question_are_a_bad_row(preprocess):
    rows = [{"question": "Q", "choices": ["w", "x"], "answer": 1}, {"choices": ["w", "x"], "answer": 1}]
    with pytest.raises(UserError, match="line 2: .*; its choices are to stand beside a question"):
        preprocess(rows)


@pytest.mark.parametrize(
    "kind, row",
    [
        ("prompts", {"problem": "Q", "solution": "A"}),
        ("pairs", {"problem": "Q", "chosen": "A", "rejected": "B"}),
        ("labels", {"problem": "Q", "solution": "A", "label": True}),
        ("contexts", {"Context": "C", "problem": "Q", "solution": "A"}),
    ],
)
def test_every_data_type_finds_them(answers, kind, row):
    samples = build_samples(answers(kind)([row, row]), 257)
    assert any("read problem as the question" in note for note in samples.notes)


def test_each_field_that_a_form_reads_is_shown_with_its_meaning(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Q", "input": "I", "output": "A", "id": 7}\n')
    meanings = {"instruction": "question", "output": "answer", "input": "input"}
    assert overview(tmp_path / "rows.jsonl", EncodeSettings("bytes")).taken == meanings
