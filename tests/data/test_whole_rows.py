"""Nothing of a row is lost in silence: its fields are read or named, and its label or its second answer is followed."""

import json

import pytest

from data.documents import texts
from rwkv_peft.cli import commands
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.fields import Fields, has_words
from rwkv_peft.data.sources import build_samples, split_samples
from rwkv_peft.data.templates import segments

QA = {"query": "Q", "response": "A"}
USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", "Q"), *[("assistant", "A")] * 2))
TURNS = [USER, GOOD]


def sharegpt(*words):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(words)]


def notes(output):
    return [line for line in output.splitlines() if line.startswith("note: not read: ")]


@pytest.mark.parametrize(
    "row, flags, names",
    [
        ({"body": "Two apples.", "question": "How many?", "answer": "2 (apples)", "formula": "1+1=2"}, (), "body"),
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
        ({**QA, "options": ["A", "B"]}, (), "options"),
        ({**QA, "input": "x"}, (), "input"),
        ({**QA, "input": "x"}, ("--fields", "input", "response"), "query"),
        ({"instruction": "Q", "input": "x", "output": "A", "title": "题目"}, (), "title"),
        ({**QA, "reasoning": "R"}, (), "reasoning"),
        ({**QA, "reasoning": "R"}, ("--think", "off"), ""),
        ({"messages": [USER, GOOD | {"thinking": "T"}]}, (), "thinking"),
        ({"messages": [{"role": "system", "content": "S"}, *TURNS], "system": "T"}, (), "system"),
        ({"messages": TURNS, "system": "T"}, (), ""),
        ({"messages": TURNS, "prompt": "Q", "tags": []}, (), "prompt"),
        ({"prompt": "Q", "completion": "A", "system": "", "history": [], "images": None}, (), ""),
        (
            {**QA, "id": "seed_task_0", "hash": "0a1b", "n": 3, "day": "2024-05-01", "url": "https://a.b", "ok": None},
            (),
            "",
        ),
    ],
)
def test_texts_that_are_not_read_are_named_in_one_note(preprocess, capsys, row, flags, names):
    preprocess([row, row | {"n": 1}], *flags)
    found = notes(capsys.readouterr().out)
    assert len(found) == bool(names)
    if names:
        told = ", ".join(f"{name} (2 rows)" for name in names.split())
        assert found[0].startswith(f"note: not read: {told}; preprocess --template lays out any field")
        assert ("--think" in found[0]) == (names in ("reasoning", "thinking"))


@pytest.mark.parametrize(
    "value, words",
    [
        *(("a b", True), ("Algebra", True), ("closed_qa", True), ("3 apples", True), ("有3个", True), (["x"], True)),
        *(("train-0001", False), ("https://a/b", False), ("2024-05-01", False), ("3 + 4", False), ("", False)),
        *((3, False), (True, False), (None, False), ([1, {"a": "b7"}], False), ([1, {"a": "b 7"}], True)),
    ],
)
def test_what_is_text(value, words):
    """It has a letter, and is not a single ASCII word with a digit or ://, as ids, dates and links are."""
    assert has_words(value) == words


def test_deeply_nested_and_long_values_take_no_time():
    value = "a7" * 1_000_000
    for _ in range(100_000):
        value = [value]
    assert not has_words(value)
    while value:  # a destructor that recurses would overflow
        value = value[0] if isinstance(value, list) else None


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
    {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD | {"content": "B"}]},
    {"chosen_messages": TURNS, "rejected_messages": [USER, BAD | {"content": "B"}]},
    {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
    {"messages": TURNS, "chosen": TURNS, "rejected": [USER, BAD | {"content": "B"}]},
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


def test_a_command_that_learns_nothing_exits_with_2_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": [USER]}))
    with pytest.raises(UserError) as refused:
        commands.main(["preprocess", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out" / "data")])
    assert refused.value.code == 2 and not (tmp_path / "out" / "data.bin").exists()


@pytest.mark.parametrize(
    "row",
    [
        {"answer_id": "ShareGPT4", "model_id": "gpt-4", "Question": "What is it?", "Equation": "3+4"},
        {
            "category": "closed_qa",
            "Frage": "Wie?" * 20,
            "it's": "a \"b\" 'c'",
            "turns": TURNS,
            "meta": {"a": 1},
            "n": None,
        },
    ],
)
def test_fields_that_are_not_known_are_shown_and_none_is_proposed(preprocess, row):
    with pytest.raises(UserError) as refused:
        preprocess([row, {name: f"{value} it's" * 9 if isinstance(value, str) else 1 for name, value in row.items()}])
    (heading, line, _) = str(refused.value).splitlines()
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


@pytest.mark.parametrize("value", [True, None, float("nan"), float("inf"), ["4"]])
def test_what_is_neither_text_nor_a_number_is_refused(preprocess, value):
    with pytest.raises(UserError, match=f"field 'answer' holds {type(value).__name__}, not text"):
        preprocess([{"question": "Q", "answer": value}])


def test_exchanges_of_human_and_assistant_are_turns(preprocess):
    exchanges = [{"human": "P", "assistant": "O"}, {"human": "Q", "assistant": "A"}]
    turns = {"messages": [*sharegpt("P", "O", "Q", "A")]}
    for row in {"conversation": exchanges}, {"conversation_id": 1, "system": "S", "conversation": exchanges}:
        beside = {"system": "S"} if "system" in row else {}
        assert segments(row) == segments(turns | beside)
        assert segments(row, "off") == segments(turns | beside, "off")
    assert texts(preprocess([{"conversation": exchanges}])) == texts(preprocess([turns]))
    # a column of another meaning is in nobody's way
    assert segments(QA | {"conversation": "c7"}) == segments(QA)


def test_one_object_over_several_lines_is_a_row(preprocess):
    assert texts(preprocess(json.dumps(QA, indent=2), name="in.json")) == texts(preprocess([QA]))


def test_a_split_names_the_file_that_leaves_nothing(answers, tmp_path):
    config = answers("sft")([QA], dataload="pad")
    with pytest.raises(UserError, match=rf"--val_split 0.1: leaves 0 of {config.path}'s 1 sample to train on"):
        split_samples(config, 257, 0.1)


def test_a_row_records_what_is_read():
    row = Fields({"a": "x", "b": "y", "c": "z", "d": 1})
    copied = row.without("a") | {"e": "w"}
    assert "b" in row and row.holds("a", "d") and row.peek("a") == "x" and dict(row) == {**row} and not row.read
    assert copied["b"] == "y" and copied.get("e") == "w" and row["a"] == "x"
    assert list(row.unread()) == ["c"]
