"""Rows are laid out as text by their fields, a template and roles; no text in them is lost in silence."""

import json
from itertools import groupby
from pathlib import Path

import pytest

from data.documents import chat, shared, talk, texts, valued
from rwkv_peft.cli import commands
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.chat import THINKING, ChatLayout
from rwkv_peft.data.fields import json_kind
from rwkv_peft.data.layouts import TEMPLATES, RowLayout
from rwkv_peft.data.sources import build_samples
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
    due = [token for text in ChatLayout().question(words, system=system) for token in encode(text)]
    for row in ({"query": words, "response": "Yo"}, {"messages": [{"role": "user", "content": words}, ANSWER]}):
        asked = [text for text, counts in RowLayout().segments(row | beside) if not counts]
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
    plain = RowLayout().segments(row)
    assert RowLayout().segments(row | {"system": "Be. "}) == [("System: Be.\n\n", False), *plain]
    assert RowLayout().segments(row | {"system": ""}) == RowLayout().segments(row | {"system": None}) == plain
    with pytest.raises(UserError, match="field 'system' holds a list, not text"):
        RowLayout().segments(row | {"system": ["Be."]})


@pytest.mark.parametrize(
    "beside, what, begins",
    [
        ({"system": "Be."}, "a system text", "System: Be.\n\nUser: Hi?"),
        ({"tools": [{"name": "weather"}]}, "tools", "System: Tools:\n"),
        ({"functions": [{"name": "weather"}]}, "tools", "System: Tools:\n"),
    ],
)
def test_a_prompt_as_it_stands_has_no_place_for_a_system_turn(preprocess, beside, what, begins):
    row = {"prompt": "Hi?", "completion": " Yo", **beside}
    with pytest.raises(UserError, match=f"{what} beside its prompt.*; name yours, as --fields"):
        preprocess([row])
    assert texts(preprocess([row], "--fields", "prompt", "completion"))[0][0].startswith(begins)


@pytest.mark.parametrize(
    "row, name",
    [
        ({"prompt": "Hi?", "completion": "Yo", "history": [["A", "B"]]}, "history"),
        (chat("Hi?", "Yo") | {"history": [["A", "B"]]}, "history"),
        ({"query": "Hi?", "response": "Yo", "tool_calls": "[1]"}, "tool_calls"),
        ({"prompt": "Hi?", "chosen": "Yo", "rejected": "No", "history": [["A", "B"]]}, "history"),
    ],
)
def test_what_no_layout_has_a_place_for_is_refused_and_not_lost(row, name):
    laid_out = RowLayout().pair if "chosen" in row else RowLayout().segments
    with pytest.raises(UserError, match=f"field '{name}' has no place in this layout"):
        laid_out(row)


@pytest.mark.parametrize("nothing", [None, "", [], "[]"])
def test_a_field_that_holds_nothing_is_in_nobodys_way(nothing):
    row = {"query": "Hi?", "response": "Yo"}
    assert RowLayout().segments(row | {"history": nothing, "tools": nothing}) == RowLayout().segments(row)
    assert RowLayout().segments(chat("Hi?", "Yo", tool_calls=nothing)) == RowLayout().segments(chat("Hi?", "Yo"))


@pytest.mark.parametrize(
    "row", [{"instruction": "Hi?", "input": "", "output": "Yo"}, {"query": "Hi?", "response": "Yo"}, chat("Hi?", "Yo")]
)
def test_a_text_beside_answers_is_taken_where_it_is_named_and_else_refused(preprocess, row):
    with pytest.raises(UserError, match="a row has a text, which counts as a whole, and .*; name yours, as --fields"):
        preprocess([row | {"text": "Be. Hi? Yo"}])
    assert texts(preprocess([row | {"text": "Be. Hi? Yo"}], "--fields", "text")) == [("Be. Hi? Yo", "Be. Hi? Yo")]
    assert (
        RowLayout().segments(row | {"text": ""})
        == RowLayout().segments(row | {"text": None})
        == RowLayout().segments(row)
    )


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
    parts = RowLayout().segments({"messages": [{"role": role, "content": words} for role, words in turns]})
    runs = [("".join(text for text, _ in run), counts) for counts, run in groupby(parts, key=lambda part: part[1])]
    text = "".join(f"[[{text}]]" if counts else text for text, counts in runs)
    assert f"```\n{text[:-2]}<end>]]\n```" in page


def part(text, kind="text"):
    return {"type": kind, "text": text}


# trl's conversational prompts: what the assistant said there does not count
ASKED = talk(("user", "A"), ("assistant", "B"), ("user", "Hi"))["messages"]
ASKED_TEXT = "User: A\n\nAssistant: B\n\nUser: Hi"


@pytest.mark.parametrize(
    "row, text, counted",
    [
        (talk(("developer", "Be."), ("user", "Hi"), ("assistant", "Yo")), "System: Be.\n\nUser: Hi", " Yo"),
        (talk(("user", [part("Hi "), part("you", "input_text")]), ("assistant", [part("Yo")])), "User: Hi you", " Yo"),
        (talk(("user", ["Hi"]), ("assistant", [{"text": "Yo", "image_url": None}])), "User: Hi", " Yo"),
        (shared(("human", "Hi"), ("observation", "3"), ("gpt", "Yo")), "User: Hi\n\nUser: Function output:\n3", " Yo"),
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
        (talk(("user", [part("See"), IMAGE]), ("assistant", "Yo")), "has the type 'image_url', and an RWKV model"),
        (talk(("user", [{"type": "text"}])), "of the type 'text', has the fields type; it needs a text"),
        (talk(("user", "Hi"), ("assistant", [valued("f", "tool_call")])), "a call of a tool is a text that is not"),
        (talk(("user", [valued("hm", "reasoning"), valued("x.png", "image_url")])), "has the type 'image_url'"),
        ({"query": "Hi?", "response": "Yo", "history": [["A"]]}, "field 'history' holds .*; it takes a list of"),
        (talk(("user", [7])), "a part of a turn's content is a number"),
        (talk(("user", [part([])])), "field 'text' holds a list, not text"),
        (talk(("user", "Hi"), ("assistant", None)), "field 'content' of a turn is null; give it the turn's words"),
        (shared(("alien", "Hi")), "role 'alien'; known are user, .*developer, .*observation"),
        (talk(("user", "See <image>"), ("assistant", "Yo")) | {"images": ["x.png"]}, "field 'images' is no text"),
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
    (talk(("user", "Q"), ("assistant", ""), ("user", "R"), ("assistant", "B")), "with an empty answer, "),
    (talk(("user", "Q")), "without an answer, so that none of their tokens counts in the loss"),
    (talk(("assistant", "A"), ("user", "Q")), "whose last turn is not the model's, and so is not learned"),
    (talk(("user", "Q"), ("assistant", "A"), ("tool", "R")), "whose last turn is not the model's, "),
    ({"text": "User: Q\n\nAssistant: A"}, "in which a text or a question holds turns of a chat, such as User:"),
    (
        {"text": "Below is a task.\n\n### Instruction:\nQ\n\n### Response:\nA"},
        "in which a text or a question holds turns",
    ),
    ({"text": "Question: Q\n\nAnswer: A\n\nQuestion: R\n\nAnswer: B"}, "in which a text or a question holds turns "),
)


@pytest.mark.parametrize("row, note", NOTES)
def test_rows_that_may_not_be_what_they_were_meant_to_be_are_told(preprocess, capsys, row, note):
    preprocess([{"query": "Q", "response": "A"}, row])
    assert [line for line in capsys.readouterr().out.splitlines() if "note:" in line and f"note: 1 row {note}" in line]
    preprocess([row, {"query": "R", "response": "B"}, row])
    told = [line for line in capsys.readouterr().out.splitlines() if "note:" in line]
    assert len(told) == 2 and told[0 if "text" not in row else 1].startswith(f"note: 2 rows {note}")
    assert any(line.startswith("note: 1 row the same as an earlier one") for line in told)


@pytest.mark.parametrize(
    "rows",
    [
        [talk(("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")), {"query": "Q", "response": "A"}],
        [{"messages": [*ASKED, {"role": "assistant", "content": "Yo", "weight": 0}]}],
        [{"text": "A"}, {"text": "User: Q"}, {"prompt": "Q", "completion": "A"}, {"prompt": "Q", "completion": "B"}],
        " \n\nA\n",
    ],
)
def test_nothing_is_told_of_rows_in_order(preprocess, capsys, rows):
    preprocess(rows, name="in.txt" if isinstance(rows, str) else "in.jsonl")
    assert "note:" not in capsys.readouterr().out


BAD = [{"text": "a"}, talk(("alien", "x")), {"q": "a"}, talk(("elf", "x")), *({"text": [i]} for i in range(3))]
BAD += [{"text": "b"}]
KINDS = (
    "6 bad rows{}, of 3 kinds, the first of each:",
    "  3 x  {}, line 5: field 'text' holds a list, not text",
    "  2 x  {}, line 2: role 'alien'; known are ",
    "  1 x  {}, line 3: a row has the fields q 'a'; known are ",
)


def told_of_bad_rows(path, left_out):
    return [line.format(left_out if number == 0 else path) for number, line in enumerate(KINDS)]


def test_all_bad_rows_are_told_by_kind(preprocess, tmp_path, capsys):
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
    with pytest.raises(UserError, match=r"150 bad rows, of 150 kinds, .*\n(.*\n){8}  and 142 rows of other kinds$"):
        preprocess([{f"field{chr(97 + i // 12)}{chr(97 + i % 12)}": 1} for i in range(150)])


@pytest.mark.parametrize("name", ["data", "held"])
@pytest.mark.parametrize("kind", ["sft", "pairs"])
def test_a_run_leaves_bad_rows_out_on_request(tmp_path, monkeypatch, capsys, tiny_state, kind, name):
    """From the data that it trains on, and from that on which it validates."""
    from rwkv_peft.checkpoints.base import save_model

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


QA = {"query": "Q", "response": "A"}
USER, GOOD, WORSE = ({"role": role, "content": text} for role, text in (("user", "Q"), *[("assistant", "A")] * 2))
TURNS = [USER, GOOD]


def sharegpt(*words):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(words)]


def notes(output):
    return [line for line in output.splitlines() if line.startswith("note: not read: ")]


@pytest.mark.parametrize(
    "row, flags, names",
    [
        (
            {"body": "Two apples.", "question": "How many?", "answer": "2 (apples)", "formula": "1+1=2"},
            (),
            "body formula",
        ),
        ({"article": "Long ago.", **QA}, (), "article"),
        ({"text": "A plan.", "prompt": "Plan!"}, (), "prompt"),
        ({"text": "A text.", "meta": {"source": {"name": "a book"}}}, (), "meta"),
        (
            {"instruction": "Q", "context": "It is so.", "response": "A"},
            ("--fields", "instruction", "response"),
            "context",
        ),
        (
            {"instruction": "Q", "context": "It is so.", "response": "A"},
            ("--fields", "response"),
            "instruction context",
        ),
        ({**QA, "note": "Here too."}, ("--template", "chat"), "note"),
        ({**QA, "variants": ["A", "B"]}, (), "variants"),
        ({**QA, "input": "x"}, (), "input"),
        ({**QA, "input": "x"}, ("--fields", "input", "response"), "query"),
        ({"instruction": "Q", "input": "x", "output": "A", "title": "题目"}, (), "title"),
        ({**QA, "reasoning": "R"}, (), "reasoning"),
        ({**QA, "reasoning": "R"}, ("--think", "off"), ""),
        ({"messages": [USER, GOOD | {"thinking": "T"}]}, (), "thinking"),
        (chat("Q", [{"type": "reasoning", "value": "T"}, "A"]), (), "reasoning_content"),
        ({"messages": [{"role": "system", "content": "S"}, *TURNS], "system": "T"}, (), "system"),
        ({"messages": TURNS, "system": "T"}, (), ""),
        ({"messages": TURNS, "prompt": "Q", "tags": []}, (), ""),
        ({"prompt": "Q", "completion": "A", "system": "", "history": [], "images": None}, (), ""),
        (
            {**QA, "id": "seed_task_0", "n": 3, "day": "2024-05-01", "ok": True, "no": None, "sizes": [0, 4]},
            (),
            "id n day ok sizes",
        ),
        ({**QA, "corrected": "4", "weight": 1}, (), "corrected"),
    ],
)
def test_texts_that_are_not_read_are_named_in_one_note(preprocess, capsys, row, flags, names):
    preprocess([row, row], *flags)
    found = notes(capsys.readouterr().out)
    assert len(found) == bool(names)
    if names:
        told = ", ".join(f"{name} (2 rows)" for name in names.split())
        assert found[0].startswith(f"note: not read: {told}; preprocess --template lays out any field")
        assert ("--think" in found[0]) == (names in THINKING)


@pytest.mark.parametrize(
    "row, mark, remedy",
    [
        (
            chat("Q", "<|begin_of_thought|>hm<|end_of_thought|><|begin_of_solution|>A"),
            "'<|begin_of_thought|>'",
            "think on",
        ),
        ({**QA, "query": "Q<|endoftext|>"}, "'<|endoftext|>'", "take out"),
        ({**QA, "query": "Q\0"}, "'\\x00'", "take out"),
        ({"text": "a<|im_end|>"}, "'<|im_end|>'", "take out"),
        (chat("Q", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'), "'<tool_call>'", "tool_form hermes"),
    ],
)
def test_marks_of_other_models_that_are_learned_as_text_are_named(preprocess, capsys, row, mark, remedy):
    preprocess([row])
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: learned as text")]
    assert f"{mark} (1 row)" in note and remedy in note
    if remedy != "take out":
        preprocess([row], *f"--{remedy}".split())
        assert "learned as text" not in capsys.readouterr().out


def test_the_marks_of_a_row_are_named_in_one_order(preprocess, capsys):
    preprocess([{"text": "<|f|> <|e|> <|d|> <|c|> <|b|> <|a|>"}])
    assert ", ".join(f"'<|{letter}|>' (1 row)" for letter in "abcdef") in capsys.readouterr().out


LABELLED = (
    {"prompt": "Q", "completion": "A"},
    {"query": "Q", "response": "A"},
    {"instruction": "Q", "output": "A"},
    {"messages": TURNS},
    {"prompt": [USER], "completion": [GOOD]},
    {"text": "A"},
)
COMPARED = (
    {"prompt": "Q", "chosen": "A", "rejected": "B"},
    {"conversations": sharegpt("Q"), "chosen": sharegpt("", "A")[1], "rejected": sharegpt("", "B")[1]},
    {"conversations": sharegpt("P", "O", "Q"), "chosen": sharegpt("", "A")[1], "rejected": sharegpt("", "B")[1]},
    {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [WORSE | {"content": "B"}]},
    {"chosen_messages": TURNS, "rejected_messages": [USER, WORSE | {"content": "B"}]},
    {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
    {"messages": TURNS, "chosen": TURNS, "rejected": [USER, WORSE | {"content": "B"}]},
)


@pytest.mark.parametrize(
    "row, data_type",
    [*((row | {"label": label}, "labels") for row in LABELLED for label in (True, False))]
    + [(row, "pairs") for row in COMPARED],
)
def test_labels_and_pairs_are_not_learned_as_good_answers(preprocess, answers, row, data_type):
    with pytest.raises(UserError, match=f"line 2: .* train.py --data_type {data_type} learns from"):
        preprocess([{"text": "a"}, row])
    with pytest.raises(UserError, match=f"line 2: .* train.py --data_type {data_type} learns from"):
        build_samples(answers("sft")([{"text": "a"}, row], dataload="pad"), 257)
    if "text" not in row:
        assert len(build_samples(answers(data_type)([row, row]), 257)) == 2


def test_answers_of_pairs_may_be_learned_by_name(preprocess):
    assert texts(preprocess([COMPARED[0]], "--fields", "prompt", "chosen")) == [("User: Q\n\nAssistant: A", " A")]
    for row in COMPARED[-1], {"turns": TURNS}:
        name = next(iter(row))
        assert texts(preprocess([row], "--fields", name)) == [("User: Q\n\nAssistant: A", " A")]
    with pytest.raises(UserError, match="--data_type labels"):
        preprocess([QA | {"label": False}], "--fields", "query", "response")


@pytest.mark.parametrize("data_type", ["pairs", "prompts", "labels", "contexts"])
def test_every_data_type_names_what_it_does_not_read(answers, data_type):
    row = {"prompt": "Q", "chosen": "A", "rejected": "B"} if data_type == "pairs" else {"question": "Q", "answer": "A"}
    row |= {"label": True} if data_type == "labels" else {"context": "C is so."} if data_type == "contexts" else {}
    for more in {}, {"body": "Two apples."}, {"text": "All."} if data_type != "labels" else {}:
        found = build_samples(answers(data_type)([row | more, row | more]), 257).notes
        told = [note for note in found if "not read" in note]
        assert len(told) == bool(more) and all(f"not read: {next(iter(more))} (2 rows); " in note for note in told)


@pytest.mark.parametrize(
    "rows, why",
    [
        ([{"messages": [USER]}] * 2, "2 rows without an answer, so that none of their tokens counts in the loss"),
        ([{"messages": [USER], "answer": "It is A."}], "1 row without an answer.*; not read: answer .1 row."),
        ([{"segments": [{"text": "a", "train": False}]}], "1 row without an answer"),
    ],
)
def test_a_file_of_which_nothing_counts_is_refused(preprocess, answers, rows, why):
    with pytest.raises(UserError, match=f"no token counts in the loss, so that there is nothing to learn: {why}"):
        preprocess(rows)
    with pytest.raises(UserError, match="no token counts in the loss"):
        build_samples(answers("sft")(rows, dataload="pad"), 257)
    assert len(preprocess([*rows, QA])) == len(rows) + 1


@pytest.mark.parametrize(
    "row",
    [
        {"answer_id": "ShareGPT4", "model_id": "gpt-4", "Question": "What is it?", "Equation": "3+4"},
        {
            "category": "closed_qa",
            "Frage": "Wie?" * 20,
            "it's": "a \"b\" 'c'",
            "talk": TURNS,
            "meta": {"a": 1},
            "n": None,
        },
    ],
)
def test_fields_that_are_not_known_are_shown_and_none_is_proposed(preprocess, row):
    with pytest.raises(UserError) as refused:
        preprocess([row, {name: f"{value} it's" * 9 if isinstance(value, str) else 1 for name, value in row.items()}])
    heading, line = str(refused.value).splitlines()
    assert heading == "2 bad rows, the first of them:" and line.startswith("  2 x  ")
    for name, value in row.items():
        shown = {list: "[…]", dict: "{…}"}.get(type(value), repr(value[:30]) if isinstance(value, str) else "None")
        assert f"{name} {shown}" in line
    assert line.endswith("; name yours, as --fields QUESTION ANSWER or --fields TEXT")


def test_the_message_about_unknown_fields_is_bounded(preprocess):
    with pytest.raises(UserError) as refused:
        preprocess([{f"{n}" * 999: "a" * 10**6 for n in range(999)}])
    assert len(str(refused.value)) < 10_000


@pytest.mark.parametrize("number, digits", [(4, "4"), (-2.5, "-2.5"), (4.0, "4.0"), (10**30, f"{10**30}")])
def test_a_number_is_its_digits(preprocess, number, digits):
    for row in {"question": "Q", "answer": number}, {"messages": [USER, GOOD | {"content": number}]}:
        assert texts(preprocess([row])) == [(f"User: Q\n\nAssistant: {digits}", f" {digits}")]
    assert texts(preprocess([{"prompt": number, "completion": number}])) == [(digits * 2, digits)]


@pytest.mark.parametrize("row", [{"question": "Q", "answer": False}, {"q": "Q", "a": False}])
def test_an_answer_may_be_true_or_false(preprocess, capsys, row):
    assert texts(preprocess([row])) == [("User: Q\n\nAssistant: false", " false")]
    assert "not read" not in capsys.readouterr().out


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), 10**309, ["4"]])
def test_what_is_neither_text_nor_a_number_is_refused(preprocess, value):
    with pytest.raises(UserError, match=f"field 'answer' holds {json_kind(value)}, not text"):
        preprocess([{"question": "Q", "answer": value}])


def test_exchanges_of_human_and_assistant_are_turns(preprocess):
    exchanges = [{"human": "P", "assistant": "O"}, {"human": "Q", "assistant": "A"}]
    turns = {"messages": [*sharegpt("P", "O", "Q", "A")]}
    for row in {"conversation": exchanges}, {"conversation_id": 1, "system": "S", "conversation": exchanges}:
        beside = {"system": "S"} if "system" in row else {}
        assert RowLayout().segments(row) == RowLayout().segments(turns | beside)
        assert RowLayout("off").segments(row) == RowLayout("off").segments(turns | beside)
    assert texts(preprocess([{"conversation": exchanges}])) == texts(preprocess([turns]))
    # a column of another meaning is in nobody's way
    assert RowLayout().segments(QA | {"conversation": "c7"}) == RowLayout().segments(QA)


def test_one_object_over_several_lines_is_a_row(preprocess):
    assert texts(preprocess(json.dumps(QA, indent=2), name="in.json")) == texts(preprocess([QA]))
