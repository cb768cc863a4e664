"""Rows of recent data sets: roles, contents in parts, turns without words."""

import json

import pytest

from data.documents import texts
from rwkv_peft.cli.errors import UserError


def chat(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def shared(*turns):
    return {"conversations": [{"from": role, "value": value} for role, value in turns]}


def part(text, kind="text"):
    return {"type": kind, "text": text}


# trl's conversational prompts: what the assistant said there does not count
ASKED = chat(("user", "A"), ("assistant", "B"), ("user", "Hi"))["messages"]
ASKED_TEXT = "User: A\n\nAssistant: B\n\nUser: Hi"


@pytest.mark.parametrize(
    "row, text, counted",
    [
        (chat(("developer", "Be."), ("user", "Hi"), ("assistant", "Yo")), "System: Be.\n\nUser: Hi", " Yo"),
        (chat(("user", [part("Hi "), part("you", "input_text")]), ("assistant", [part("Yo")])), "User: Hi you", " Yo"),
        (chat(("user", ["Hi"]), ("assistant", [{"text": "Yo", "image_url": None}])), "User: Hi", " Yo"),
        (shared(("human", "Hi"), ("observation", "3"), ("gpt", "Yo")), "User: Hi\n\nTool: 3", " Yo"),
        ({"prompt": ASKED, "completion": [{"role": "assistant", "content": "Yo"}]}, ASKED_TEXT, " Yo"),
        ({"prompt": ASKED, "completion": "Yo"}, ASKED_TEXT, " Yo"),
    ],
)
def test_roles_and_contents_of_today(preprocess, row, text, counted):
    assert texts(preprocess([row])) == [(f"{text}\n\nAssistant:{counted}", counted)]


IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}


@pytest.mark.parametrize(
    "row, message",
    [
        (chat(("user", [part("See"), IMAGE]), ("assistant", "Yo")), "has the type 'image_url', and an RWKV model"),
        (chat(("user", [{"type": "text"}])), "has the type 'text'"),
        (chat(("user", [7])), "a part of a turn's content is int"),
        (chat(("user", [part([])])), "field 'text' holds list, not text"),
        (chat(("user", "Hi"), ("assistant", None)), "field 'content' of a turn is null; give it the turn's words"),
        (shared(("alien", "Hi")), "role 'alien'; known are user, .*developer, .*observation"),
        (chat(("user", "See <image>"), ("assistant", "Yo")) | {"images": ["x.png"]}, "field 'images' is no text"),
        ({"question": "Q", "answer": "A", "image": {"path": "x.png"}}, "field 'image' is no text, and only"),
        ({"messages": [{"role": "user", "content": "Q", "audio": [1]}]}, "field 'audio' is no text"),
    ],
)
def test_what_no_layout_has_a_place_for_is_named(preprocess, row, message):
    with pytest.raises(UserError, match=f"line 1: .*{message}"):
        preprocess([row])


NOTES = (
    ({"query": "Q", "response": " "}, "with an empty answer, which teaches the model to say nothing there"),
    ({"prompt": "Q", "completion": ""}, "with an empty answer, "),
    (chat(("user", "Q"), ("assistant", ""), ("user", "R"), ("assistant", "B")), "with an empty answer, "),
    (chat(("user", "Q")), "without an answer, so that none of their tokens counts in the loss"),
    (chat(("assistant", "A"), ("user", "Q")), "whose last turn is not the model's, and so is not learned"),
    (chat(("user", "Q"), ("assistant", "A"), ("tool", "R")), "whose last turn is not the model's, "),
    ({"query": " ", "response": "A"}, "in which a turn before an answer is empty"),
    ({"instruction": "", "output": "A"}, "in which a turn before an answer is empty"),
    (chat(("system", ""), ("user", "Q"), ("assistant", "A")), "in which a turn before an answer is empty"),
    (chat(("user", "Q"), ("assistant", "A"), ("user", ""), ("assistant", "B")), "in which a turn before an answer is"),
    ({"text": "User: Q\n\nAssistant: A"}, "whose text holds questions and answers, and counts as a whole in the loss"),
    ({"text": "<s>[INST] Q [/INST] A</s>"}, "whose text has the turns of another model's template, such as <|im_start"),
    ({"text": "Below is a task.\n\n### Instruction:\nQ\n\n### Response:\nA"}, "whose text has the turns of another"),
    ({"text": "Question: Q\n\nAnswer: A\n\nQuestion: R\n\nAnswer: B"}, "whose text holds questions and answers, "),
)


@pytest.mark.parametrize("row, note", NOTES)
def test_rows_that_may_not_be_what_they_were_meant_to_be_are_told(preprocess, capsys, row, note):
    preprocess([{"query": "Q", "response": "A"}, row])
    assert [line for line in capsys.readouterr().out.splitlines() if "note:" in line and f"note: 1 row {note}" in line]
    preprocess([row, {"query": "R", "response": "B"}, row | {"id": 1}])
    told = [line for line in capsys.readouterr().out.splitlines() if "note:" in line]
    assert len(told) == 2 and told[0 if "text" not in row else 1].startswith(f"note: 2 rows {note}")
    assert any(line.startswith("note: 1 row the same as an earlier one") for line in told)


@pytest.mark.parametrize(
    "rows",
    [
        [chat(("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")), {"query": "Q", "response": "A"}],
        [{"messages": [*ASKED, {"role": "assistant", "content": "Yo", "weight": 0}]}],
        [{"text": "A"}, {"text": "User: Q"}, {"prompt": "Q", "completion": "A"}, {"prompt": "Q", "completion": "B"}],
        " \n\nA\n",
    ],
)
def test_nothing_is_told_of_rows_in_order(preprocess, capsys, rows):
    preprocess(rows, name="in.txt" if isinstance(rows, str) else "in.jsonl")
    assert "note:" not in capsys.readouterr().out


BAD = [{"text": "a"}, chat(("alien", "x")), {"q": "a"}, chat(("elf", "x")), *({"text": [i]} for i in range(3))]
BAD += [{"text": "b"}]
KINDS = (
    "6 bad rows{}, of 3 kinds, the first of each:",
    "  3 x  {}, line 5: field 'text' holds list, not text",
    "  2 x  {}, line 2: role 'alien'; known are ",
    "  1 x  {}, line 3: a row has the fields q 'a'; known are ",
)


def told_of_bad_rows(path, left_out):
    return [line.format(left_out if number == 0 else path) for number, line in enumerate(KINDS)]


@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_all_bad_rows_are_told_by_kind(preprocess, tmp_path, capsys, monkeypatch, chunk):
    monkeypatch.setattr("rwkv_peft.data.rows.CHUNK_BYTES", chunk)
    with pytest.raises(UserError) as caught:
        preprocess(BAD)
    lines = str(caught.value).splitlines()
    assert lines[-1] == "(--skip_bad_rows leaves such rows out, and counts them)" and len(lines) == 5
    expected = told_of_bad_rows(tmp_path / "in.jsonl", "")
    assert all(line.startswith(start) for line, start in zip(lines, expected))
    assert not (tmp_path / "out").exists()
    assert [text for text, _ in texts(preprocess(BAD, "--skip_bad_rows"))] == ["a", "b"]
    said = capsys.readouterr().out
    assert all(line in said for line in told_of_bad_rows(tmp_path / "in.jsonl", " left out"))


def test_one_bad_row_and_many_kinds(preprocess, capsys):
    preprocess('{"text": "a"}\n{}\nnonsense\n{"text": ""}\n{"text": "b"}\n', "--skip_bad_rows")
    said = capsys.readouterr().out
    assert "2 bad rows left out, of 2 kinds" in said and "1 x  " in said and "1 empty row left out" in said
    preprocess('{"text": "a"}\nnonsense\n', "--skip_bad_rows")
    assert "1 bad row left out:\n  " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"150 bad rows, of 101 kinds, .*\n(.*\n){8}  and 93 rows of other kinds\n"):
        preprocess([{f"field{chr(97 + i // 12)}{chr(97 + i % 12)}": 1} for i in range(150)])


@pytest.mark.parametrize("name", ["data", "held"])
@pytest.mark.parametrize("kind", ["sft", "pairs"])
def test_a_run_leaves_bad_rows_out_on_request(tmp_path, monkeypatch, capsys, tiny_state, kind, name):
    """From the data that it trains on, and from that on which it validates."""
    from rwkv_peft.checkpoints.base import save_model
    from rwkv_peft.cli import commands

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_model(tmp_path / "base.pth", tiny_state(vocab_size=257))
    good = [{"query": "Q", "response": str(i)} for i in range(3)]
    if kind == "pairs":
        good = [{"query": "Q", "chosen": str(i), "rejected": "no"} for i in range(3)]
    for file in ("data", "held"):
        rows = good + [{"query": 7}, {"query": "Q"}] * (file == name)
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    flags = f"train --load_model base.pth --data_file data.jsonl --val_data held.jsonl --data_type {kind} "
    command = (flags + "--tokenizer bytes --bone_r 16 --show_samples 3").split()
    with pytest.raises(UserError, match=r"(?s)2 bad rows.*\(--skip_bad_rows leaves such rows out"):
        commands.main(command)
    assert commands.main([*command, "--skip_bad_rows"]) == 0
    assert "sample 3" in capsys.readouterr().out
