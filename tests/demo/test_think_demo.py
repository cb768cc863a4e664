"""The demo of thinking: rows of three lengths that --think_labels separates, and the figures of a model's answers."""

import json
import re

import pytest

from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.data.chat import THINK
from rwkv_peft.data.encoding import EncodeSettings, encoder

LABELLED = re.compile(r"What is there\?( \(think[^)]*\))\n\nAssistant: <think>\n(.*)\n</think>\n(.*)")


def test_rows_are_labelled_by_their_lengths_and_answered_truly(thinking, task):
    documents = encoder(EncodeSettings("bytes", think="on", think_labels=(32, 64), end_token=False)).documents
    seen = set()
    for row in thinking.documents("rows", 400, 1):
        (found,) = documents(row)
        words, thought, answer = LABELLED.search("".join(text for text, _ in found)).groups()
        (mode,) = [mode for mode, _, tokens in thinking.LENGTHS if len(thought) in tokens]
        assert words == THINK[mode].words and f"has {answer}." in row["messages"][0]["content"] and answer in thought
        seen.add(mode)
    assert len(seen) == len(thinking.LENGTHS)


def test_the_same_arguments_give_the_same_file_and_questions_of_their_own(thinking, task, tmp_path):
    files = [tmp_path / name for name in ("one", "two", "three", "heldout")]
    for path, kind, seed in zip(files, ["rows", "rows", "rows", "heldout"], "1121"):
        assert thinking.main([kind, "--documents", "30", "--seed", seed, "--output", str(path)]) == 0
    one, two, three, heldout = (path.read_text() for path in files)
    assert one == two != three
    for text, due in ((one, False), (heldout, True)):
        told = re.findall(r"(\w+) has (\d) (\w+) (\w+)\.", text)
        assert told and {task.Fact(name, int(count), *rest).held_out for name, count, *rest in told} == {due}


ANSWERS = {"low": ">\n3 red hats.\n</think>\n3 red hats", "medium": ">Hm.</think>\n3 red hats", "high": f">{'h' * 99}"}


@pytest.mark.parametrize("at_least, code", [(0.0, 0), (0.1, 1)])
def test_lengths_and_answers_are_counted(thinking, tmp_path, tiny_state, monkeypatch, capsys, at_least, code):
    from rwkv_peft.inference import decode

    def complete(subject, prompts, continuations, *settings):
        (mode,) = [mode for mode in ANSWERS if THINK[mode].words in subject.tokenizer.decode(prompts[0])]
        for number, continuation in enumerate(continuations):
            continuation.text = ANSWERS[mode]
            yield number

    monkeypatch.setattr(decode, "complete", complete)
    save_model(tmp_path / "model.pth", tiny_state(vocab_size=257))
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "Ann has 3 red hats.\nWhat is there?", "answer": "3 red hats"}) + "\n")
    assert thinking.ask(tmp_path / "model.pth", questions, at_least) == code
    figures = [re.findall(r"[\d.]+%?", line) for line in capsys.readouterr().out.splitlines()[-3:]]
    due = [("13.0", "100.0%", "100.0%"), ("3.0", "0.0%", "100.0%"), ("99.0", "100.0%", "0.0%")]
    assert [(mean, given, right) for mean, _, _, given, right in figures] == due
