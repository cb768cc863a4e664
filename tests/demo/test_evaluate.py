"""Held-out questions: both runtimes give the same answers, and the score counts only exact ones."""

import fcntl
import io
import json
import os
import pty
import random
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.cli.errors import UserError


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


def test_an_expected_answer_changes_nothing_but_the_time(evaluate, model):
    prompts = [[66, 5, 9], [7, 8], [100]]
    free = evaluate.answer_with_rwkv(model, prompts, stop={0})
    stop = {0, free[0][30]}
    plain = evaluate.answer_with_rwkv(model, prompts, stop)
    for wrong in (0, 3, 20):  # where the expectation leaves the answer; a stop within it; too long a one
        drafts = [[*tokens[:wrong], 255 - tokens[wrong], *tokens[wrong + 1 :], 9, 9] for tokens in free]
        assert evaluate.answer_with_rwkv(model, prompts, stop, drafts) == plain
    assert evaluate.answer_with_rwkv(model, prompts, stop, free) == plain


def test_a_log_hears_of_answers_every_ten_seconds(evaluate, monkeypatch):
    log, clock = io.StringIO(), iter([0.0, 4.0, 11.0, 11.0, 12.0, 22.0, 22.0, 40.0])
    monkeypatch.setattr(evaluate.sys, "stderr", log)
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(clock))
    progress = evaluate.Progress(9)
    for _ in range(4):
        progress.update(1000, 2)
    progress.update(1000, 1)
    assert log.getvalue().splitlines() == ["4 of 9 answered, 2,000 tokens", "8 of 9 answered, 4,000 tokens"]


@pytest.mark.parametrize("runtime", ["rwkv_peft", "rwkv"])
def test_a_terminal_sees_a_bar_while_it_waits(evaluate, model, tmp_path, runtime, warm_python):
    questions = write_questions(tmp_path / "q.jsonl", [{"prompt": "ab", "completion": " c\n"}] * 3)
    command = [warm_python, str(Path(evaluate.__file__)), "--model", str(model), "--questions", str(questions)]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    os.set_blocking(ours, False)
    done = subprocess.run([*command, "--runtime", runtime], stdout=subprocess.PIPE, stderr=theirs, text=True)
    assert done.returncode == 0 and "exact match" in done.stdout
    assert "/3" in os.read(ours, 100000).decode()
    os.close(theirs)
    os.close(ours)


@pytest.mark.parametrize("base, runtime", [("rwkv6", "rwkv_peft"), ("rwkv7", "rwkv_peft"), ("rwkv7", "rwkv")])
def test_the_bundled_bases_answer_in_words(evaluate, task, tmp_path, base, runtime, warm_python):
    pytest.importorskip("rwkv")
    rng = random.Random("words")
    facts = [task.draw_fact(rng, held_out=True) for _ in range(24)]
    prompts = [f"{task.tell(rng, fact)}Q: What is there?\nA:" for fact in facts]
    answers = [f" {fact.count} {fact.color} {fact.item}\n" for fact in facts]
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(prompts, answers)]
    questions = write_questions(tmp_path / "q.jsonl", rows)
    program = Path(evaluate.__file__)
    # a process of its own, as the package computes one generation a process
    command = [warm_python, str(program), "--model", str(program.with_name(f"{base}-demo.pth"))]
    command += ["--questions", str(questions), "--runtime", runtime, "--at_least", "0.9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_answer_ends_with_its_first_stop(evaluate, model):
    (free,) = evaluate.answer(model, [[66, 5, 9]], stop=set())
    assert len(free) == evaluate.LONGEST
    (ended,) = evaluate.answer(model, [[66, 5, 9]], stop={free[7]})
    assert ended == free[: free.index(free[7]) + 1]


def test_the_score_counts_exact_answers(evaluate, model, tmp_path, capsys, monkeypatch):
    rows = [{"prompt": "a", "completion": " yes\n"}, {"prompt": "b", "completion": " no\n"}]
    questions = write_questions(tmp_path / "questions.jsonl", rows)
    monkeypatch.setattr(evaluate, "answer", lambda path, prompts, *rest: [[byte + 1 for byte in b" yes\n"]] * 2)
    arguments = ["--model", str(model), "--questions", str(questions)]
    assert evaluate.main(arguments + ["--at_least", "0.5"]) == 0
    assert evaluate.main(arguments + ["--at_least", "0.6"]) == 1
    assert "exact match 50.0%: 1 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "questions.jsonl: no such file"),
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
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UserError, match=message):
        evaluate.read_questions(path, 10)


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


def test_the_rwkv7_has_the_widths_that_rwkv_lm_s_classes_fix():
    """Those classes take only a channel count and a number of layers, so that a model of other widths does not load."""
    tensors = open_base(Path(__file__).resolve().parents[2] / "demo" / "rwkv7-demo.pth").tensors
    C = tensors["emb.weight"].shape[1]
    low = {name: max(32, round(factor * C**0.5 / 32) * 32) for name, factor in zip("wavg", (2.5, 2.5, 1.7, 5.0))}
    for block in range(3):
        att, ffn = f"blocks.{block}.att.", f"blocks.{block}.ffn."
        assert tuple(tensors[f"{ffn}key.weight"].shape) == (4 * C, C)
        assert tuple(tensors[f"{ffn}value.weight"].shape) == (C, 4 * C)
        assert tuple(tensors[f"{att}r_k"].shape) == (C // 64, 64)
        for name in "wavg" if block else "wag":
            assert tuple(tensors[f"{att}{name}1"].shape) == (C, low[name])
            assert tuple(tensors[f"{att}{name}2"].shape) == (low[name], C)
