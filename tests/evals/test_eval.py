"""The command on rows of one's own: how rows become problems, and what the demo's base answers."""

import json
import math
import signal
import subprocess
from pathlib import Path

import pytest

from rwkv_peft.cli.errors import Ended, UserError
from rwkv_peft.cli.tables import TASKS as CLASSES
from rwkv_peft.data.chat import stops_of
from rwkv_peft.evals import command, flags
from rwkv_peft.evals.command import standard_error, summary
from rwkv_peft.evals.rows import LAYOUTS, example, layout_of, stops_of_prompt

ROOT = Path(__file__).resolve().parents[2]
MODEL = ("--model", str(ROOT / "demo" / "rwkv6-demo.pth"))
STORY = "The sun is up. Tom has 3 brown grapes. A dog sleeps.\nQ: {}\nA:"
ROWS = [
    {"prompt": STORY.format("How many?"), "completion": " 3"},
    {"prompt": STORY.format("What is there?"), "completion": " 3 Brown grapes."},
    {"prompt": STORY.format("What color?"), "completion": " never"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def run(capsys):
    def run(*arguments):
        assert command.main([*map(str, arguments), *MODEL]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_answers_are_judged_and_kept(tmp_path, warm_python):
    data, output = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "answers.jsonl"
    words = ["eval", "jsonl", *MODEL, "--data", data, "--output", str(output), "--stop", r"\n", "--escapes"]
    done = subprocess.run([warm_python, "-m", "rwkv_peft", *words], capture_output=True, text=True)
    assert done.returncode == 0 and "3/3" in done.stderr, done.stderr
    assert done.stdout.splitlines() == [
        "jsonl: 3 problems",
        "strict       33.3% ± 33.3% (standard error), 1 of 3",
        "flexible     66.7% ± 33.3% (standard error), 2 of 3",
    ]
    head, *records = map(json.loads, output.read_text().splitlines())
    assert head["eval"]["task"] == "jsonl"
    assert [record["number"] for record in records] == [0, 1, 2]
    assert [command.main([*words[1:], "--at_least", share]) for share in ("0.3", "0.4")] == [0, 1]
    assert [record["generated"] for record in records[:2]] == [" 3", " 3 brown grapes"]


@pytest.mark.parametrize("end, code", [(KeyboardInterrupt(), 130), (Ended(signal.SIGTERM), 143)])
def test_an_interrupt_keeps_what_was_answered(tmp_path, monkeypatch, capsys, end, code):
    def interrupted(task, subject, due, *how, ask=command.ask):
        yield from list(ask(task, subject, {0: due[0]}, *how))
        raise end

    monkeypatch.setattr(command, "ask", interrupted)
    data, output = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "answers.jsonl"
    words = ["jsonl", *MODEL, "--data", data, "--output", str(output), "--stop", "\n"]
    assert command.main(words) == code
    assert "after 1 of 3 problems" in capsys.readouterr().err
    assert len(output.read_text().splitlines()) == 2


def test_a_choice_is_the_continuation_that_the_model_finds_likelier(run, tmp_path):
    choices = ["3 brown grapes", "4 red dolls", "5 hats"]
    rows = [{"question": STORY.format("What is there?"), "choices": choices, "answer": 0}]
    rows += [{"question": STORY.format("How many?"), "choices": ["9", "3"], "answer": "A"}]
    output = tmp_path / "o.jsonl"
    lines = run("choices", "--template", "plain", "--data", write(tmp_path / "c.jsonl", rows), "--output", output)
    assert lines[1:] == [
        "by sum       50.0% ± 50.0% (standard error), 1 of 2",
        "by byte      50.0% ± 50.0% (standard error), 1 of 2",
    ]
    record = json.loads(output.read_text().splitlines()[1])
    assert record["logprobs"][0] == max(record["logprobs"]) and len(record["logprobs"]) == 3


def test_a_backslash_and_n_in_a_stop_are_told(tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", ROWS[:1])
    for more, told in (((), 1), (("--escapes",), 0)):
        assert command.main(["jsonl", *MODEL, "--data", data, "--max_tokens", "2", "--stop", r"\n", *more]) == 0
        assert capsys.readouterr().err.count("add --escapes") == told


def test_examples_stand_before_the_question(run, tmp_path, monkeypatch):
    rows = [{"question": f"{n}+1?", "answer": f"{n + 1}"} for n in range(4)]
    prompts = []

    def ask(task, subject, due, *how):
        prompts.extend(problem.prompt for problem in due.values())
        return [{"number": number, "strict": True, "flexible": True} for number in due]

    monkeypatch.setattr(command, "ask", ask)
    data, shots = write(tmp_path / "d.jsonl", rows[2:]), write(tmp_path / "s.jsonl", rows[:2])
    run("jsonl", "--data", data, "--shots", 2, "--shots_data", shots)
    assert prompts[0] == ("User: 0+1?\n\nAssistant: 1\n\nUser: 1+1?\n\nAssistant: 2\n\nUser: 2+1?\n\nAssistant:")
    with pytest.raises(UserError, match="is --data, and would show its answers"):
        run("jsonl", "--data", data, "--shots", 1, "--shots_data", data)
    with pytest.raises(UserError, match="--shots 3: .* holds 2"):
        run("jsonl", "--data", data, "--shots", 3, "--shots_data", shots)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["choice", "--data", "d.jsonl"], "did you mean choices"),
        (["gsm8k", "--data", "d.jsonl"], "--data d.jsonl does not .*harness .gsm8k.: it is for jsonl and choices, "),
        (["jsonl", "--data", "d.jsonl", "--stop", ""], "empty text"),
        (["jsonl", "--data", "d.jsonl", "--batch", "0"], "--batch: 0 is below 1"),
        (["jsonl", "--data", "d.jsonl", "--at_least", "90"], "--at_least: 90 is no share"),
        (["x", "--limit", "0"], "0 is below 1"),
        (["x", "--include_path", "absent"], "--include_path absent is no folder"),
        (["x", "--fewshot", "2"], "did you mean --num_fewshot"),
    ],
)
def test_mistaken_flags_are_told(arguments, message):
    with pytest.raises(UserError, match=message):
        flags.parse_flags([*arguments, *MODEL])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--data", "empty.jsonl"], "empty.jsonl holds no problem"),
        (["--data", "bad.jsonl"], "bad.jsonl, line 2: a row has the fields"),
        (["--data", "good.jsonl", "--template", "absent"], "--template absent"),
        (["--data", "good.jsonl", "--output", "good.jsonl"], "is the file given as --data"),
        (["--data", "good.jsonl", "--model", "absent.pth", "--output", "new.jsonl"], "absent.pth"),
    ],
)
def test_files_that_cannot_serve_are_told(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    good = {"question": "q", "answer": "1"}
    write(tmp_path / "good.jsonl", [good])
    write(tmp_path / "bad.jsonl", [good, {"question": "q"}])
    write(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match=message):
        command.main(["jsonl", *MODEL, *arguments])
    assert not (tmp_path / "new.jsonl").exists()


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
        assert task.score(text, problem.answer) == {"strict": strict, "flexible": flexible}


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
    assert task.score(by_length, problem) == {"by sum": False, "by byte": True}


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
        ("choices", {"question": [3], "choices": ["a", "b"], "answer": 0}, "'question' holds a list"),
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
