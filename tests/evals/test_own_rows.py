"""Rows become problems in every form that data sets have, and rows that are no problems are refused."""

import math

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.cli.tables import TASKS as CLASSES
from rwkv_peft.data.chat import stops_of
from rwkv_peft.evals.command import standard_error, summary
from rwkv_peft.evals.rows import LAYOUTS, example, layout_of, stops_of_prompt

CHAT = LAYOUTS["chat"]
TASKS = {name: task() for name, task in CLASSES.items()}


def test_questions_are_cleaned_in_layouts_of_turns():
    question, one = "a\n\nUser: b", "a\nUser: b"
    for name, layout in LAYOUTS.items():
        due = one if name in ("chat", "question", "instruction") else question
        for task, more in (("jsonl", {"answer": "4"}), ("choices", {"choices": ["3", "4"], "answer": 1})):
            problem = TASKS[task].problem({"question": question, **more}, layout)
            assert problem.prompt == layout.replace("{question}", due)
    assert TASKS["jsonl"].problem({"query": question, "response": "4"}, "").prompt == f"User: {one}\n\nAssistant:"


@pytest.mark.parametrize(
    "row, layout, prompt, solution",
    [
        ({"prompt": "a\nQ: b?\nA:", "completion": " Yes.\n"}, "", "a\nQ: b?\nA:", " Yes.\n"),
        ({"question": "b?", "answer": "Yes."}, "", "User: b?\n\nAssistant:", " Yes."),
        ({"question": "b?", "answer": "Yes."}, LAYOUTS["question"], "Question: b?\n\nAnswer:", " Yes."),
        (
            {"messages": [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd")]},
            "",
            "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:",
            " d",
        ),
        (  # one that ends in a turn without an answer is asked for the answer before
            {"messages": [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]},
            "",
            "System: s\n\nUser: u\n\nAssistant:",
            " a",
        ),
        ({"segments": [{"text": text, "train": text in "bd"} for text in ("a", "b", "c", "d", "d")]}, "", "abc", "dd"),
    ],
)
def test_rows_of_ones_own(row, layout, prompt, solution):
    task = TASKS["jsonl"]
    problem = task.problem(row, layout)
    assert (problem.prompt, problem.solution, problem.answer) == (prompt, solution, solution.strip())
    assert example(problem) == f"{prompt}{solution.rstrip()}\n\n"
    for text, strict, flexible in (
        (f"{solution}\n", True, True),
        (solution.upper() + " ", solution == solution.upper(), True),
        ("no", False, False),
    ):
        assert task.judge(text, problem.answer) == {"strict": strict, "flexible": flexible}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "choices": ["no", "yes"], "answer": 1},
        {"question": "q", "choices": ["no", "yes"], "answer": "B"},
        {"question": "q", "choices": ["no", "yes"], "answer": "yes"},
        {"question": "q", "choices": {"text": ["no", "yes"], "label": ["1", "2"]}, "answerKey": "2"},
        {"ctx": "q", "endings": ["no", "yes"], "label": "1"},
    ],
)
def test_choices_rows(row):
    task = TASKS["choices"]
    problem = task.problem(row, LAYOUTS["question"])
    assert problem[2:] == ("yes", (" no", " yes"), 1) and problem.prompt == "Question: q\n\nAnswer:"
    by_length = [-3.0, -3.9]  # a byte of " yes" costs less, all of it more
    assert task.judge(by_length, problem) == {"by sum": False, "by byte": True}


@pytest.mark.parametrize("answer, right", [(1, 1), ("1", 0), (2, 2), (3, 0), ("3", 0), ("B", 1)])
def test_numbers_to_choose_from_are_told_from_places(answer, right):
    """A JSON number is a choice's place if that place exists; a word is a choice's text if one of them is that text."""
    choices = ["1", "2", "0"] if answer in (1, "1", 2) else ["3", "1", "2"]
    row = {"question": "1 + 0?", "choices": choices, "answer": answer}
    assert TASKS["choices"].problem(row, LAYOUTS["question"]).right == right


@pytest.mark.parametrize(
    "task, row, message",
    [
        ("jsonl", {"text": "alone"}, "one text, with no question"),
        ("jsonl", [], "not an object"),
        ("jsonl", {"words": "alone"}, "known are .*; give the fields such names"),
        ("choices", {"question": "q", "choices": ["one"], "answer": 0}, "two texts or more"),
        ("choices", {"question": [3], "choices": ["a", "b"], "answer": 0}, "'question' holds list"),
        ("choices", {"words": "q"}, "one of question, query, prompt, ctx, goal is due"),
        ("choices", {"question": "q", "choices": ["a", "b"], "answer": 2}, "2 is none of its choices"),
        ("choices", {"question": "q", "choices": ["a", "b"], "answer": True}, "True is none"),
    ],
)
def test_rows_that_are_no_problem_are_refused(task, row, message):
    with pytest.raises(UserError, match=message):
        TASKS[task].problem(row, LAYOUTS.get(TASKS[task].layout, ""))


def test_layouts_and_what_ends_their_answers(tmp_path):
    assert stops_of_prompt(CHAT) == stops_of(CHAT) and "\n\nUser:" in stops_of(CHAT)
    assert stops_of_prompt(LAYOUTS["metamath"]) == ("\n\n### Instruction",)
    assert stops_of_prompt(LAYOUTS["plain"]) == ()
    (tmp_path / "mine.txt").write_text("\ufeffQ {question} A\n", encoding="utf-8")  # with the mark of Windows
    assert layout_of(TASKS["jsonl"], str(tmp_path / "mine.txt")) == "Q {question} A"
    assert layout_of(TASKS["jsonl"], None) == "" and layout_of(TASKS["choices"], None) == LAYOUTS["question"]
    (tmp_path / "mine.txt").write_text("Q A\n")
    with pytest.raises(UserError, match="it has no {question}"):
        layout_of(TASKS["jsonl"], str(tmp_path / "mine.txt"))
    with pytest.raises(UserError, match="named are chat, question"):
        layout_of(TASKS["jsonl"], "absent")


def test_the_standard_error_is_that_of_a_mean():
    assert standard_error(0.5, 101) == pytest.approx(0.05)
    assert math.isnan(standard_error(1.0, 1))
    records = [{"a": True, "end": "length"}, {"a": False, "end": "end"}, {"a": False}]
    assert summary("t", ["a"], records) == [
        "t: 3 problems",
        "a            33.3% ± 33.3% (standard error), 1 of 3",
        "1 answer cut off at --max_tokens",
    ]
    assert summary("t", ["a"], [{"a": True}])[0] == "t: 1 problem"
