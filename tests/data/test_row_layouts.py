"""Rows are laid out as text by their fields, a template and roles; what has no place in a layout is refused."""

import json
from itertools import groupby
from pathlib import Path

import pytest

from data.documents import chat, texts
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.row_forms import pair
from rwkv_peft.data.templates import TEMPLATES, question, segments
from rwkv_peft.data.tokenizer import load_tokenizer

ANSWER = {"role": "assistant", "content": "Yo"}


@pytest.mark.parametrize(
    "row, text, counted",
    [
        ({"text": "héllo\n"}, "héllo\n", "héllo\n"),
        ({"query": "2+2?", "response": "4"}, "User: 2+2?\n\nAssistant: 4", " 4"),
        ({"question": "2+2?", "answer": "4"}, "User: 2+2?\n\nAssistant: 4", " 4"),
        ({"instruction": "Add", "input": "2 2", "output": "4"}, "Instruction: Add\n\nInput: 2 2\n\nResponse: 4", " 4"),
        ({"instruction": "Sing", "input": "", "output": "la"}, "Instruction: Sing\n\nResponse: la", " la"),
        ({"prompt": "a", "completion": "b"}, "ab", "b"),
        (
            {"messages": [{"role": "system", "content": "Be."}, *chat("Hi ", "Yo", "So?", "No")["messages"]]},
            "System: Be.\n\nUser: Hi\n\nAssistant: Yo\n\nUser: So?\n\nAssistant: No",
            " Yo\n\nUser: No",
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
            "User: Hi\n\nAssistant: Yo",
            " Yo",
        ),
        ({"messages": json.dumps(chat("Hi", "Yo")["messages"])}, "User: Hi\n\nAssistant: Yo", " Yo"),
    ],
)
def test_every_form_of_row(preprocess, row, text, counted):
    dataset = preprocess([row])
    assert texts(dataset) == [(text, counted)]
    assert dataset[0][-1] == 0  # the end token
    if dataset.mask is not None:
        assert dataset.mask[-1] == 1  # which the model learns to write


@pytest.mark.parametrize("words", ["Hi", " spaced  ", "two\n\nparagraphs\n", "多谢。", "tab\t", "a:\r\nb\n"])
@pytest.mark.parametrize("system", ["", "Be kind.\n"])
def test_a_question_has_the_tokens_of_a_chats_turn(words, system):
    """Those that generate --chat, serve and the page ask with."""
    encode = load_tokenizer("world").encode
    beside = {"system": system} if system else {}
    due = [token for text in question(words, system=system) for token in encode(text)]
    for row in ({"query": words, "response": "Yo"}, {"messages": [{"role": "user", "content": words}, ANSWER]}):
        asked = [text for text, counts in segments(row | beside) if not counts]
        assert [token for text in asked for token in encode(text)] == due


def test_fields_and_templates_name_others(preprocess, tmp_path):
    row = {"q": "2+2?", "a": "4"}
    assert texts(preprocess([row], "--fields", "q", "a")) == [("User: 2+2?\n\nAssistant: 4", " 4")]
    assert texts(preprocess([row], "--fields", "a")) == [("4", "4")]
    (tmp_path / "template").write_text("Q: {q}\nA:[[ {a}]] end\n")
    dataset = preprocess([row], "--template", str(tmp_path / "template"))
    assert texts(dataset) == [("Q: 2+2?\nA: 4 end", " 4")]
    (tmp_path / "template").write_text("{q}:\n\n")  # of which the last ends the file's line
    assert texts(preprocess([row], "--template", str(tmp_path / "template"))) == [("2+2?:\n", "2+2?:\n")]
    (tmp_path / "template").write_text("{q} {a}")
    assert texts(preprocess([row], "--template", str(tmp_path / "template"))) == [("2+2? 4", "2+2? 4")]


@pytest.mark.parametrize(
    "row",
    [
        {"query": "Hi?", "response": "Yo"},
        {"instruction": "Hi?", "output": "Yo"},
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yo"}]},
    ],
)
def test_a_system_text_beside_a_question_stands_before_it(row):
    plain = segments(row)
    assert segments(row | {"system": "Be. "}) == [("System: Be.\n\n", False), *plain]
    assert segments(row | {"system": ""}) == segments(row | {"system": None}) == plain
    with pytest.raises(UserError, match="field 'system' holds list, not text"):
        segments(row | {"system": ["Be."]})


def test_a_prompt_as_it_stands_has_no_place_for_a_system_text(preprocess):
    row = {"prompt": "Hi?", "completion": " Yo", "system": "Be."}
    with pytest.raises(UserError, match="a system text beside its prompt.*; name yours, as --fields"):
        preprocess([row])
    assert "System: Be.\n\nUser: Hi?" in texts(preprocess([row], "--fields", "prompt", "completion"))[0][0]


@pytest.mark.parametrize(
    "row, name",
    [
        ({"query": "Hi?", "response": "Yo", "history": [["A", "B"]]}, "history"),
        ({"instruction": "Hi?", "output": "Yo", "history": [["A", "B"]]}, "history"),
        ({"prompt": "Hi?", "completion": "Yo", "tools": [{"name": "weather"}]}, "tools"),
        ({"prompt": "Hi?", "completion": "Yo", "functions": "[1]"}, "functions"),
        ({"query": "Hi?", "response": "Yo", "tool_calls": "[1]"}, "tool_calls"),
        ({"prompt": "Hi?", "chosen": "Yo", "rejected": "No", "history": [["A", "B"]]}, "history"),
    ],
)
def test_what_no_layout_has_a_place_for_is_refused_and_not_lost(row, name):
    laid_out = pair if "chosen" in row else segments
    with pytest.raises(UserError, match=f"field '{name}' has no place in this layout"):
        laid_out(row)


@pytest.mark.parametrize("nothing", [None, "", [], "[]"])
def test_a_field_that_holds_nothing_is_in_nobodys_way(nothing):
    row = {"query": "Hi?", "response": "Yo"}
    assert segments(row | {"history": nothing, "tools": nothing}) == segments(row)
    assert segments(chat("Hi?", "Yo", tool_calls=nothing)) == segments(chat("Hi?", "Yo"))


@pytest.mark.parametrize(
    "row", [{"instruction": "Hi?", "input": "", "output": "Yo"}, {"query": "Hi?", "response": "Yo"}, chat("Hi?", "Yo")]
)
def test_a_text_beside_answers_is_taken_where_it_is_named_and_else_refused(preprocess, row):
    with pytest.raises(UserError, match="a row has a text, which counts as a whole, and .*; name yours, as --fields"):
        preprocess([row | {"text": "Be. Hi? Yo"}])
    assert texts(preprocess([row | {"text": "Be. Hi? Yo"}], "--fields", "text")) == [("Be. Hi? Yo", "Be. Hi? Yo")]
    assert segments(row | {"text": ""}) == segments(row | {"text": None}) == segments(row)


def test_layouts_have_names(preprocess):
    row = {"query": "2+2?", "response": "4"}
    assert texts(preprocess([row], "--template", "chat")) == texts(preprocess([row]))
    with pytest.raises(UserError, match="chat, question, instruction"):
        preprocess([row], "--template", "chatty")


@pytest.mark.parametrize("text", ["no field", "{a} [[", "{a} ]] [[", "[[ {a} [[ ]] ]]"])
def test_bad_templates_are_named(preprocess, tmp_path, text):
    (tmp_path / "template").write_text(text)
    with pytest.raises(UserError, match="template"):
        preprocess([{"a": "b"}], "--template", str(tmp_path / "template"))


def test_the_documented_layouts_are_those_of_the_code():
    page = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "data.md").read_text(encoding="utf-8")
    for name, text in TEMPLATES.items():
        assert f"| `{name}` | `{text}` |".replace("\n", "⏎") in page
    turns = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "And 3+3?"), ("assistant", "6")]
    parts = segments({"messages": [{"role": role, "content": words} for role, words in turns]})
    runs = [("".join(text for text, _ in run), counts) for counts, run in groupby(parts, key=lambda part: part[1])]
    text = "".join(f"[[{text}]]" if counts else text for text, counts in runs)
    assert f"```\n{text[:-2]}<end>]]\n```" in page
