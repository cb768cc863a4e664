"""Rows become problems in every form that data sets have, and rows that are no problems are refused."""

import math

import pytest

from rwkv_peft.data.templates import stops_of
from rwkv_peft.errors import UserError
from rwkv_peft.evals.layouts import LAYOUTS, example, read_layout, stops_of_prompt
from rwkv_peft.evals.records import standard_error, summary
from rwkv_peft.evals.task import Score
from rwkv_peft.tables import TASKS as CLASSES

CHAT = LAYOUTS["chat"]
TASKS = {name: task() for name, task in CLASSES.items()}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
        {"query": "2+2?", "response": "2+2 is 4.\n#### 4\nThe answer is: 4"},
        {"question": "2+2?", "answer": "4"},
    ],
)
def test_gsm8k_rows(row):
    task = TASKS["gsm8k"]
    problem = task.problem(row, CHAT)
    assert problem.prompt == "User: 2+2?\n\nAssistant:" and problem.answer == "4"
    assert example(problem.prompt, problem.solution).endswith("4\n\n")
    for text, strict, flexible in (
        ("#### 4.0", True, True),
        ("It is 4", False, True),
        ("#### 4, not 5", True, False),
        ("no", False, False),
    ):
        assert task.judge(text, problem) == {"strict": strict, "flexible": flexible}


def test_questions_are_cleaned_in_layouts_of_turns():
    question, one = "a\n\nUser: b", "a\nUser: b"
    for name, layout in LAYOUTS.items():
        due = one if name in ("chat", "question", "instruction") else question
        problem = TASKS["gsm8k"].problem({"question": question, "answer": "#### 4"}, layout)
        assert problem.prompt == layout.replace("{question}", due)
    assert TASKS["jsonl"].problem({"query": question, "response": "4"}, "").prompt == f"User: {one}\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "x?", "solution": r"so $\boxed{\frac12}$"},
        {"problem": "x?", "solution": "long", "answer": r"\frac12"},
        {"query": "x?", "response": r"The answer is: \frac12"},
    ],
)
def test_math_rows(row):
    pytest.importorskip("math_verify")
    task = TASKS["math"]
    problem = task.problem(row, CHAT)
    assert (problem.prompt, problem.answer) == ("User: x?\n\nAssistant:", r"\frac12")
    for text, strict, flexible in (
        (r"\boxed{0.5}", True, True),
        ("so it is $0.5$", False, True),
        (r"\boxed{2}", False, False),
    ):
        assert task.judge(text, problem) == {"strict": strict, "flexible": flexible}


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
    assert task.judge(f"{solution}\n", problem) == {"strict": True, "flexible": True}
    assert task.judge(solution.upper() + " ", problem) == {"strict": solution == solution.upper(), "flexible": True}
    assert task.judge("no", problem) == {"strict": False, "flexible": False}


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
    by_length = [Score(-3.0, False), Score(-3.9, False)]  # a byte of " yes" costs less, all of it more
    assert task.judge(by_length, problem) == {"by sum": False, "by byte": True}


@pytest.mark.parametrize("answer, right", [(1, 1), ("1", 0), (2, 2), (3, 0), ("3", 0), ("B", 1)])
def test_numbers_to_choose_from_are_told_from_places(answer, right):
    """A JSON number is a choice's place if that place exists; a word is a choice's text if one of them is that text."""
    choices = ["1", "2", "0"] if answer in (1, "1", 2) else ["3", "1", "2"]
    row = {"question": "1 + 0?", "choices": choices, "answer": answer}
    assert TASKS["choices"].problem(row, LAYOUTS["question"]).right == right


def test_lambada_rows():
    problem = TASKS["lambada"].problem({"text": " He took the dog for a walk. \n"}, LAYOUTS["plain"])
    assert (problem.prompt, problem.continuations) == ("He took the dog for a", (" walk.",))
    assert TASKS["lambada"].judge([Score(-1.0, True)], problem) == {"last word": True}


@pytest.mark.parametrize(
    "task, row, message",
    [
        ("gsm8k", {"question": "q", "answer": "3 or 4"}, "no number after ####"),
        ("gsm8k", {"question": "q"}, "one of answer, response, solution is due"),
        ("gsm8k", {"question": [3], "answer": "#### 4"}, "'question' holds list"),
        ("gsm8k", [], "not an object"),
        ("math", {"problem": "q", "solution": "5"}, "has no .boxed{answer}"),
        ("jsonl", {"text": "alone"}, "one text, with no question"),
        ("jsonl", {"words": "alone"}, "known are .*; give the fields such names"),
        ("choices", {"question": "q", "choices": ["one"], "answer": 0}, "two texts or more"),
        ("choices", {"question": "q", "choices": ["a", "b"], "answer": 2}, "2 is none of its choices"),
        ("choices", {"question": "q", "choices": ["a", "b"], "answer": True}, "True is none"),
        ("lambada", {"text": "word"}, "no last word"),
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
    assert read_layout(str(tmp_path / "mine.txt")) == "Q {question} A"
    (tmp_path / "mine.txt").write_text("Q A\n")
    with pytest.raises(UserError, match="it has no {question}"):
        read_layout(str(tmp_path / "mine.txt"))
    with pytest.raises(UserError, match="named are chat, question"):
        read_layout("absent")


def test_the_standard_error_is_that_of_a_mean():
    assert standard_error(0.5, 101) == pytest.approx(0.05)
    assert math.isnan(standard_error(1.0, 1))
    records = [{"a": True, "end": "length"}, {"a": False, "end": "end"}, {"a": False}]
    assert summary("t", ["a"], records) == [
        "t: 3 problems",
        "a            33.3% ± 33.3% (standard error), 1 of 3",
        "1 answer cut off at --max_tokens",
    ]
    lines = summary("t", ["a"], [{"a": True, "logprobs": [-math.log(8)]}])
    assert lines[0] == "t: 1 problem" and lines[-1] == "perplexity 8 of the last word"
