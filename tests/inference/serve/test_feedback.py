"""What clients say of answers becomes rows that name what gave them; other feedback is refused with a message."""

import json

import pytest
from test_kept_states import ASK, HI, text_of

from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.encoding import EncodeSettings, Totals, encoder
from rwkv_peft.inference.serve import app
from rwkv_peft.inference.serve.feedback import BYTES, AnswerLog, RememberedChat

SYSTEM = {"role": "system", "content": "Be brief."}


def chat(server, **fields):
    """-> (the response's id, the answer)."""
    fields = ASK | {"messages": [SYSTEM, HI]} | fields
    status, _, body = server.send("POST", "/v1/chat/completions", fields)
    assert status == 200, body
    if not isinstance(body, str):
        return body["id"], body["choices"][0]["message"]["content"]
    chunks = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: {")]
    return chunks[0]["id"], "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def say(server, **body):
    status, _, found = server.send("POST", "/v1/feedback", body)
    return status, found


@pytest.fixture
def rows(server, files):
    """A function that returns the rows since the test began."""
    path = files / "feedback.jsonl"
    before = len(path.read_text().splitlines()) if path.exists() else 0
    return lambda: [json.loads(line) for line in path.read_text().splitlines()[before:]]


@pytest.mark.parametrize("stream", [False, True])
def test_feedback_on_an_answer_becomes_a_row_that_is_read(server, files, rows, stream):
    scaled, answer = chat(server, stream=stream, adapter_scale=0.5)
    _, text = chat(server)
    ended, short = chat(server, stop=text[4:6], stream=stream)
    assert say(server, id=scaled, text=" Hello ") == (200, {"id": scaled, "object": "feedback", "index": 0})
    assert say(server, id=ended, mark="good")[0] == say(server, id=ended, mark="bad")[0] == 200
    better, good, bad = rows()
    assert (better["messages"], better["chosen"], better["rejected"]) == ([SYSTEM, HI], "Hello", answer)
    assert better["model"] == str(files / "base.pth") and better["adapter"] == f"{files}/poet.safetensors=0.5"
    assert good["messages"] == [SYSTEM, HI, {"role": "assistant", "content": short}] and good["label"] is True
    assert bad["label"] is False and bad["adapter"] == f"{files}/poet.safetensors"
    for kind, number in (("pairs", 1), ("labels", 2), ("train", 2)):
        read, totals = encoder(EncodeSettings("bytes", command=kind)), Totals()
        assert sum(read.encode("", row, totals) is not None for row in (better, good, bad)) == number
        assert not totals.bad and not any("unread" in name for name in totals.counts)


@pytest.mark.parametrize("path, fields", [("/v1/messages", {"system": "Be brief."}), ("/v1/responses", {})])
def test_answers_of_other_protocols_take_feedback_by_their_ids(server, rows, path, fields):
    turns = (
        {"input": [SYSTEM, HI], "max_output_tokens": 4} if "responses" in path else {"messages": [HI], "max_tokens": 4}
    )
    status, _, body = server.send("POST", path, {"model": "base", **turns, **fields})
    assert status == 200 and say(server, id=body["id"], text="Hello")[0] == 200
    (row,) = rows()
    assert [turn["role"] for turn in row["messages"]] == ["system", "user"] and row["adapter"] == ""


def test_feedback_that_cannot_be_learned_is_refused_in_openais_form(server, rows):
    cut, _ = chat(server, n=2)
    for body, status, param, words in (
        ({"id": "chatcmpl-none", "text": "a"}, 404, "id", "there is no answer 'chatcmpl-none' among the latest chats"),
        ({"id": cut, "index": 2, "text": "a"}, 404, "index", "with the index 2"),
        ({"id": cut, "text": " "}, 400, "text", "the better answer is empty"),
        ({"id": cut, "text": "a" * (10**6 + 1)}, 400, "text", "1,000,001 tokens, and an answer has at most 1,000,000"),
        ({"id": cut, "mark": "good"}, 400, "mark", "was cut off"),
        ({"id": cut, "mark": "fine"}, 400, "mark", "'fine': Input should be 'good' or 'bad'"),
        ({"id": cut}, 400, None, "give one of them"),
        ({"id": cut, "mark": "bad", "text": "a"}, 400, None, "give one of them"),
        ({"mark": "bad"}, 400, "id", "Field required"),
    ):
        found, answer = say(server, **body)
        assert (found, answer["error"]["param"]) == (status, param) and words in answer["error"]["message"]
    assert not rows() and say(server, id=cut, index=1, mark="bad")[0] == 200 and len(rows()) == 1
    assert text_of(server)  # the server goes on


def test_a_file_that_takes_no_feedback_is_refused_before_the_model_is_read(tmp_path):
    for name, message in (("notes.txt", r"\.jsonl; name it so"), ("base.jsonl", "the file given as --model")):
        (tmp_path / name).write_text("")
        with pytest.raises(UserError, match=message):
            app.main(["--model", str(tmp_path / "base.jsonl"), "--feedback", str(tmp_path / name), "--port", "0"])


def test_the_oldest_chats_are_forgotten(monkeypatch):
    log = AnswerLog(None, None)

    class Conversation:
        def __init__(self, name):
            self.response = type("Response", (), {"head": {"id": name}})

    for name in "abc":
        log.follow(None, BYTES // 2, Conversation(name))
    assert list(log.chats) == ["b", "c"] and log.size == BYTES and isinstance(log.chats["c"], RememberedChat)
