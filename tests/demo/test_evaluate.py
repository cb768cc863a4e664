"""Held-out questions: both runtimes give the same answers, and the score counts exact ones alone."""

import json

import pytest

from rwkv_peft.errors import UserError
from rwkv_peft.files.base import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_state):
    """A random byte-vocabulary model in float32, with logits far enough apart for ties not to matter."""
    state = tiny_state(vocab_size=257, seed=3)
    state["head.weight"] = state["head.weight"] * 8
    path = tmp_path_factory.mktemp("model") / "model.pth"
    save_model(path, state)
    return path


def write_questions(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_packed_prompts_are_answered_as_each_alone(evaluate, model):
    prompts = [[66, 5, 9], [7], [100, 200, 250, 3, 4, 5]]
    together = evaluate.answer(model, prompts, stop={0})
    assert together == [evaluate.answer(model, [prompt], stop={0})[0] for prompt in prompts]


def test_the_rwkv_package_answers_alike(evaluate, model):
    pytest.importorskip("rwkv")
    prompts = [[66, 5, 9], [7, 8]]
    ours = evaluate.answer(model, prompts, stop={0})
    theirs = evaluate.answer_with_rwkv(model, prompts, stop={0})
    assert [answer[:20] for answer in ours] == [answer[:20] for answer in theirs]


def test_an_answer_ends_with_its_first_stop(evaluate, model):
    (free,) = evaluate.answer(model, [[66, 5, 9]], stop=set())
    assert len(free) == evaluate.LONGEST
    (ended,) = evaluate.answer(model, [[66, 5, 9]], stop={free[7]})
    assert ended == free[: free.index(free[7]) + 1]


def test_the_score_counts_exact_answers(evaluate, model, tmp_path, capsys, monkeypatch):
    rows = [{"prompt": "a", "completion": " yes\n"}, {"prompt": "b", "completion": " no\n"}]
    questions = write_questions(tmp_path / "questions.jsonl", rows)
    monkeypatch.setattr(evaluate, "answer", lambda path, prompts, stop: [[byte + 1 for byte in b" yes\n"]] * 2)
    arguments = ["--model", str(model), "--questions", str(questions)]
    assert evaluate.main(arguments + ["--at_least", "0.5"]) == 0
    assert evaluate.main(arguments + ["--at_least", "0.6"]) == 1
    assert "exact match 50.0%: 1 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "no question"),
        (b'{"prompt": "a"}\n', "line 1"),
        (b"nonsense\n", "line 1"),
        (b"\xff\n", "not UTF-8"),
        (b'{"prompt": 5, "completion": "b"}\n', "line 1: prompt and completion must be texts"),
        (b'{"prompt": "a", "completion": null}\n', "line 1: prompt and completion must be texts"),
        (b'{"prompt": "", "completion": "b"}\n', "the prompt not empty"),
    ],
)
def test_malformed_questions_are_refused(evaluate, tmp_path, text, message):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(text)
    with pytest.raises(UserError, match=message):
        evaluate.read_questions(path, 10)


def test_missing_questions_are_named(evaluate, tmp_path):
    with pytest.raises(UserError, match="absent.jsonl: no such file"):
        evaluate.read_questions(tmp_path / "absent.jsonl", 10)


def test_a_separator_of_unicode_ends_no_line(evaluate, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "a\u2028b", "completion": "c"}\n', encoding="utf-8")
    assert evaluate.read_questions(path, 10) == [("a\u2028b", "c")]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--limit", "0"], "--limit 0"),
        (["--limit", "-1"], "--limit -1"),
        (["--at_least", "nan"], "--at_least nan"),
        (["--at_least", "90"], "--at_least 90"),
        (["--model", "absent.pth", "--runtime", "rwkv"], "absent.pth does not exist"),
        (["--model", "other.pth"], "vocabulary of 80 tokens"),
    ],
)
def test_flags_are_judged_before_the_work(evaluate, model, tiny_state, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    save_model("other.pth", tiny_state())
    questions = write_questions(tmp_path / "questions.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match=message):
        evaluate.main(["--model", str(model), "--questions", str(questions), *flags])
