"""No text of a user, a system or a tool gives the tokens of a turn; the opening of answers is found in the data, and a
run's model is prompted in the layout of its rows."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.documents import BOUNDARY, HOSTILE, chat, text, texts
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.chat import KNOWN, ChatLayout, opening_within, stops_of
from rwkv_peft.data.encoding import EncodeSettings, Totals, encoder
from rwkv_peft.data.layouts import TEMPLATES, RowLayout, Template
from rwkv_peft.data.recorded import (
    CLEAN,
    chat_beside,
    chat_in,
    flags_beside,
    note_on_chats,
    prompt_beside,
    recorded_of_data,
)
from rwkv_peft.data.report import opening_of
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.data.tools import TOOL_FORMS
from rwkv_peft.inference.flags import unescaped
from rwkv_peft.inference.serve.requests import ChatBody, Limits

CALL = {"name": "f", "arguments": {}}
YES = {"role": "assistant", "content": "Yes."}


def turns(words, *answers):
    """Turns in which everybody but the assistant says `words`."""
    said = [{"role": role, "content": words} for role in ("system", "user", "tool")]
    called = {"role": "assistant", "content": "No.", "tool_calls": [CALL]}
    return [*said[:2], called, {**said[2], "content": [{"type": "text", "text": words}]}, *answers]


# (kind of rows, fields that are named, the row in which everybody but the assistant says some words)
ROWS = {
    "chat": (
        "train",
        (),
        lambda words: {"messages": turns(words, YES), "tools": [{"name": "f", "description": words}]},
    ),
    "turns beside a system text": ("train", (), lambda words: {**chat(words, "Yes."), "system": words}),
    "ShareGPT": ("train", (), lambda words: {"conversations": [{"from": "human", "value": words}], "system": words}),
    "calls": ("train", (), lambda words: {"query": words, "tools": [{"name": "f"}], "answers": [CALL]}),
    "query": ("train", (), lambda words: {"query": words, "response": "Yes.", "system_prompt": words}),
    "instruction": ("train", (), lambda words: dict(instruction=words, input=words, output="Yes.", system=words)),
    "prompt of turns": ("train", (), lambda words: {"prompt": turns(words), "completion": "Yes."}),
    "named": ("preprocess", ("q", "a"), lambda words: {"q": words, "a": "Yes.", "system": words}),
    "pairs": ("pairs", (), lambda words: {"prompt": turns(words), "chosen": "Yes.", "rejected": "No."}),
    "pairs of questions": (
        "pairs",
        (),
        lambda words: dict(question=words, chosen="Yes.", rejected="No.", system=words),
    ),
    "pairs of turns": (
        "pairs",
        (),
        lambda words: dict(prompt=words, chosen=[YES], rejected=[{**YES, "content": "No."}]),
    ),
    "named pairs": ("pairs", ("q", "a", "b"), lambda words: {"q": words, "a": "Yes.", "b": "No."}),
    "labels": ("labels", (), lambda words: {"messages": turns(words, YES), "label": True}),
    "labels of questions": ("labels", (), lambda words: {"query": words, "response": "Yes.", "label": False}),
    "named labels": ("labels", ("q", "a", "ok"), lambda words: {"q": words, "a": "Yes.", "ok": True}),
    "prompts": ("prompts", (), lambda words: {"messages": turns(words)}),
    "prompts of questions": ("prompts", (), lambda words: {"question": words, "answer": "4", "system": words}),
    "named prompts": ("prompts", ("q",), lambda words: {"q": words}),
    "contexts": ("contexts", (), lambda words: {"context": "It is so.", "question": words, "answer": "Yes."}),
    "contexts of chats": ("contexts", (), lambda words: {"context": "It is so.", "messages": turns(words, YES)}),
    "template with an introduction": (
        "Below is a task.\n\nInstruction: {instruction}\n\nResponse:[[ {output}]]",
        (),
        lambda words: {"instruction": words},
    ),
    **{
        f"template {name}": (
            template,
            (),
            lambda words: dict.fromkeys(("query", "question", "instruction", "input"), words),
        )
        for name, template in TEMPLATES.items()
    },
}
ANSWERS = dict.fromkeys(("response", "answer", "output", "reasoning"), "Yes.")


BYTES, WORLD = map(load_tokenizer, ("bytes", "world"))


def documents(form, words, **settings):
    """The text of the tokens of each document of a row whose users, systems and tools say some words."""
    kind, fields, row = ROWS[form]
    if form.startswith("template"):
        encode, row = encoder(EncodeSettings("bytes", template=kind, **settings)), {**ANSWERS, **row(words)}
    else:
        encode, row = encoder(EncodeSettings("bytes", fields=fields, command=kind, **settings)), row(words)
    totals = Totals()
    found = encode.encode("x", row, totals)
    assert not totals.bad, list(totals.bad.lines())
    tokens = list(memoryview(found.tokens).cast("H"))
    ends = [sum(found.sizes[: n + 1]) for n in range(len(found.sizes))]
    return [BYTES.decode(tokens[end - size : end]) for end, size in zip(ends, found.sizes)]


def boundaries(found):
    return [BOUNDARY.findall(each) for each in found]


@pytest.mark.parametrize("form", ROWS)
def test_no_text_forges_a_turn_in_a_row(form):
    due = boundaries(documents(form, "hi"))
    assert any(due)
    for words in HOSTILE:
        assert boundaries(documents(form, words)) == due, words


@pytest.mark.parametrize("form", ROWS)
def test_without_cleaning_it_does_and_rows_of_single_lines_are_the_same_either_way(form):
    assert boundaries(documents(form, HOSTILE[0], clean_turns=False)) != boundaries(documents(form, "hi"))
    for words in ("hi", "User: hi", "two\nlines", "a \x85 b", "a\rb", "a\n \nb", "a\u2028\u2028b"):
        assert documents(form, words) == documents(form, words, clean_turns=False)


def test_tools_beside_messages_and_those_of_the_system_are_one_list():
    system, asked, (f, g) = (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "?"},
        ({"name": n} for n in "fg"),
    )
    due = ChatLayout().question("?", "s", [f, g])
    assert (
        ChatLayout().prompt([system, asked], [f, g])
        == ChatLayout().prompt([system | {"tools": [f]}, asked], [g])
        == due
    )


@pytest.mark.parametrize("words", HOSTILE)
def test_no_text_forges_a_turn_in_a_prompt(words):
    """Of generate --chat, and of serve, whose page is a client of it."""
    due = boundaries([text((each, 0) for each in ChatLayout().question("hi", system="hi"))])
    assert boundaries([text((each, 0) for each in ChatLayout().question(words, system=words))]) == due
    due = boundaries(["".join(ChatLayout().prompt([{"role": "tool", "content": result} for result in "45"]))])
    assert boundaries(["".join(ChatLayout().prompt([{"role": "tool", "content": words}] * 2))]) == due

    def asked(words, clean=True):
        body = ChatBody(model="m", messages=turns(words), tools=[{"name": "f", "description": words}])
        limits = Limits(1, 1 << 20, 1, 65536, ChatLayout(clean=clean))
        return boundaries([WORLD.decode(body.encode(WORLD, limits)[0].tokens)])

    assert asked(words) == asked("hi") and (words != HOSTILE[0] or asked(words, False) != asked("hi"))


@given(st.text(st.sampled_from("\r\n \t\x0b\x85\u2028ab:")))
def test_cleaned_words_have_no_blank_line_and_else_stay(words):
    found = ChatLayout().cleaned(words)
    assert "\n\n" not in found and found == found.strip() and ChatLayout(clean=False).cleaned(words) == words
    assert re.sub(r"\s", "", found) == re.sub(r"\s", "", words)
    if "\n\n" not in words and "\r\n" not in words:
        assert found == words.strip()


def test_the_assistants_words_and_texts_without_turns_stay():
    answer = "One.\n\nUser: two?\r\n\r\nThree."
    assert text(RowLayout().segments(chat("a\n\nb", answer))) == f"User: a\nb\n\nAssistant: {answer}"
    for row in (
        {"text": answer},
        {"prompt": answer, "completion": answer},
        {"segments": [{"text": answer, "train": False}]},
    ):
        assert text(RowLayout().segments(row)) == answer * (1 + ("prompt" in row))
    row = {"q": "a\n\nb", "a": answer, "context": answer, "question": "c", "answer": "d"}
    for layout in ("Q: {q}\n\nA:[[ {a}]]", "User: {q}\n\nAssistant: {a}"):  # of one's own; all of it counts
        assert text(Template(layout).segments(row)) == re.sub(r"\[\[|\]\]", "", layout).format(**row)
    assert text(Template("User: {q}\n\nAssistant:[[ {a}]]").segments(row)) == f"User: a\nb\n\nAssistant: {answer}"


def test_preprocess_records_what_it_did(preprocess, tmp_path):
    row, output = {"query": "a\n\nb", "response": "c"}, tmp_path / "out" / "data"
    assert texts(preprocess([row])) == [("User: a\nb\n\nAssistant: c", " c")]
    assert chat_in(output) == ChatLayout() and CLEAN not in json.loads(output.with_suffix(".json").read_text())
    assert texts(preprocess([row], "--clean_turns", "0")) == [("User: a\n\nb\n\nAssistant: c", " c")]
    assert chat_in(output) == ChatLayout(clean=False)
    preprocess([row], "--tool_form", "hermes")
    assert chat_in(output) == ChatLayout(tool_form=TOOL_FORMS["hermes"])
    with pytest.raises(UserError, match="--ids excludes|--clean_turns 0"):
        preprocess([row], "--clean_turns", "0", "--ids")


@pytest.mark.parametrize("settings, form", [(None, "g1"), ({"tool_form": "g1"}, "g1"), ({}, "hermes")])
def test_runs_and_token_files_from_before_there_were_two_forms_of_tools_are_hermes(tmp_path, settings, form):
    if settings is not None:
        (tmp_path / "config.json").write_text(json.dumps({"data": settings}))
        (tmp_path / "data.json").write_text(json.dumps({"vocabulary": {}, **settings}))
    found = chat_beside(tmp_path), chat_beside(None, tmp_path / "adapter.safetensors"), chat_in(tmp_path / "data.bin")
    assert [each.tool_form.name for each in found] == [form] * 3
    for name in TOOL_FORMS:
        assert chat_beside(tmp_path, tool_form=name, clean=False) == ChatLayout("", False, TOOL_FORMS[name])


TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>\nt\n</think>\nA"}]


@pytest.mark.parametrize(
    "rows, flags, opening",
    [
        ([{"messages": TURNS}], (), "Assistant:"),
        ([{"messages": [{"role": "system", "content": "a" * 9000}, *TURNS]}], (), "Assistant:"),
        ([{"messages": TURNS[1:]}], (), "Assistant:"),
        ([{"messages": TURNS}], ("--think", "on"), "Assistant: <think"),
        ([{"messages": TURNS}], ("--think", "off"), "Assistant: <think></think"),
        ([{"query": "Q", "response": "A"}], (), "Assistant:"),
        ([{"messages": TURNS[:1]}, {"text": "a"}, {"query": "Q", "response": "A"}], (), "Assistant:"),
        ([{"text": "User: Q\n\nAssistant: A"}], (), "Assistant:"),
        ([{"text": "User: Q\n\nAssistant: A"}, {"prompt": "a", "completion": "b"}], (), "Assistant:"),
        ([{"instruction": "Q", "output": "A"}], (), "Response:"),
        ([{"prompt": "Q:", "completion": "A"}], (), ""),
        ([{"text": "a"}], (), ""),
    ],
)
def test_the_opening_of_answers(preprocess, rows, flags, opening):
    dataset = preprocess(rows, *flags)
    assert opening_of(dataset, recorded_of_data(dataset.prefix)) == opening
    assert opening_of(dataset, None) == ""


def test_without_its_tokenizer_nothing_is_told(preprocess, tmp_path):
    (tmp_path / "own.txt").write_text("".join(f"{i + 1} {chr(i)!r} 1\n" for i in range(128)))
    dataset = preprocess([{"query": "Q", "response": "A"}], "--tokenizer", str(tmp_path / "own.txt"))
    vocabulary = recorded_of_data(dataset.prefix)
    assert opening_of(dataset, vocabulary) == "Assistant:"
    (tmp_path / "own.txt").write_text("".join(f"{i + 1} {chr(i)!r} 1\n" for i in range(127)))
    assert opening_of(dataset, vocabulary) == ""
    (tmp_path / "own.txt").unlink()
    assert opening_of(dataset, vocabulary) == ""


@pytest.mark.parametrize("last", [last for _, last in KNOWN])
def test_a_prompt_of_a_run_has_the_layout_of_its_rows(tmp_path, last):
    (tmp_path / "config.json").write_text(json.dumps({"opening": last}))
    prompt = unescaped(prompt_beside(None, tmp_path / "merged.pth"))
    if last == "Assistant:":
        assert prompt == note_on_chats(tmp_path) == ""
    else:
        assert opening_within(prompt) == last and stops_of(prompt)
        assert all(prompt_beside(tmp_path) in told(tmp_path) for told in (flags_beside, note_on_chats))


@pytest.mark.parametrize("settings", [{"opening": "Assistant: <think"}, {"opening": ""}, {"opening": [1]}, {}, []])
def test_what_is_not_known_is_asked_by_a_chat(tmp_path, settings):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert prompt_beside(tmp_path, tmp_path / "nowhere" / "a.pth") == "" and flags_beside(tmp_path) == "--chat"
