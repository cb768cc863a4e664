"""The table of forms: each is recognized by its fields, and a row that two forms fit is refused with both."""

import json
import re
from pathlib import Path

import pytest

from data.documents import texts
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.forms import FORMS, TURN_LISTS, form_of
from rwkv_peft.data.layouts import RowLayout

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
ALPACA = {"instruction": "Add.", "input": "2 2", "output": "4"}
ROWS = {
    "text": {"text": "T"},
    "messages": {"messages": TURNS},
    "conversations": {"conversations": TURNS},
    "query, tools and answers (calls)": {"query": "Q", "tools": [{"name": "f"}], "answers": [{"name": "f"}]},
    "query and response": {"query": "Q", "response": "A"},
    "question and answer": {"question": "Q", "answer": "A"},
    "data (texts in turn)": {"id": "1", "data": ["Q", "A"]},
    "dialog (texts in turn)": {"dialog": ["Q", "A"], "act": [1, 2]},
    "conversation (exchanges of human and assistant, or input and output)": {
        "conversation": [{"human": "Q", "assistant": "A"}]
    },
    "segments": {"segments": [{"text": "T", "train": True}]},
    "instruction, input and output": ALPACA,
    "prompt (turns) and completion": {"prompt": TURNS[:1], "completion": "A"},
    "input (turns) and output": {"input": TURNS[:1], "output": "A"},
    "contents (turns, as Gemini's tuning has them)": {
        "contents": [{"role": "user", "parts": [{"text": "Q"}]}, {"role": "model", "parts": [{"text": "A"}]}]
    },
    **{f"{name} (turns)": {name: TURNS} for name in TURN_LISTS},
    "prompt and actions (KoboldAI's stories)": {"prompt": "Once.", "actions": [" Twice.", "\n> Go."]},
    "prompt and completion": {"prompt": "Q", "completion": "A"},
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_row_is_of_one_form_and_two_forms_are_refused_with_both_names(form):
    row = ROWS[form.name]
    assert form_of(row) is form and RowLayout().segments(row)
    for other, more in ROWS.items():
        both = row | {name: value for name, value in more.items() if name not in row}
        fit = all(each.fits(both) for each in (form, form_of(more)) if {*each.fields} <= {*both})
        if other != form.name and not {*row} & {*more} and fit:  # texts in turn give way to another text
            first, second = sorted((form, form_of(more)), key=FORMS.index)
            names = (" and ".join(second.fields) if first.name == "text" else second.name), first.name
            with pytest.raises(UserError) as refused:
                RowLayout().segments(both)
            assert all(name in str(refused.value) for name in names)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": ["Q", "A"]},
        {"id": "1", "data": ["Q", "A"]},
        {"dialog": ["Q", "A"], "act": [1, 2]},
        {"conversation": [{"input": "Q", "output": "A"}]},
        {"messages": [{"role": "User", "content": "Q"}, {"role": "Chatbot", "content": "A"}]},
        {"messages": [{"author": "user", "content": "Q"}, {"author": "bot", "content": "A"}]},
        {"conversation": [{"sender": "human", "text": "Q"}, {"sender": "AI", "text": "A"}]},
        {"turns": [{"speaker": "user", "value": "Q"}, {"speaker": "assistant", "value": "A"}]},
        {"items": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"input": TURNS[:1], "output": "A"},
        {"contents": [{"role": "user", "parts": [{"text": "Q"}]}, {"role": "model", "parts": [{"text": "A"}]}]},
        ["Q", "A"],
        TURNS,
    ],
    ids=lambda row: ", ".join(row) if isinstance(row, dict) else "list",
)
@pytest.mark.parametrize("name", ["in.jsonl", "in.json"])
def test_turns_in_other_words_are_a_chat(preprocess, capsys, row, name):
    content = [row, row] if name == "in.jsonl" else json.dumps([row, row])
    chats = texts(preprocess(content, name=name))
    unread = re.findall(r"(\w+) \(2 rows\)", capsys.readouterr().out)
    assert chats == texts(preprocess([{"messages": TURNS}] * 2)) and {*unread} <= {"id", "act"}


def test_a_list_of_turns_is_one_chat(preprocess):
    assert texts(preprocess(json.dumps(TURNS), name="in.json")) == texts(preprocess([{"messages": TURNS}]))


@pytest.mark.parametrize("instruction", [{"parts": [{"text": "S"}]}, "S"])
def test_an_instruction_of_gemini_is_the_system_text(preprocess, instruction):
    row = ROWS["contents (turns, as Gemini's tuning has them)"] | {"systemInstruction": instruction}
    system = {"role": "system", "content": "S"}
    assert texts(preprocess([row])) == texts(preprocess([{"messages": [system, *TURNS]}]))


@pytest.mark.parametrize("beside", [{"messages": TURNS}, {"text": "T"}])
def test_turns_under_another_name_give_way_to_a_known_field(preprocess, beside):
    assert texts(preprocess([beside | {"turns": [*TURNS, *TURNS]}])) == texts(preprocess([beside]))


def test_texts_in_turn_give_way_to_a_question(preprocess):
    row = {"prompt": "Q", "response": "A", "data": ["x", "y"]}
    assert texts(preprocess([row])) == texts(preprocess([{"query": "Q", "response": "A"}]))


def test_each_choice_of_a_message_on_two_forms_gives_that_forms_layout(preprocess):
    """Alpaca's rows have their own text beside their fields."""
    row = ALPACA | {"text": "Add. 2 2 4"}
    with pytest.raises(UserError, match="name yours, as --fields text or --fields instruction output input") as refused:
        preprocess([row])
    first, second = re.findall(r"--fields ((?:[a-z]+ ?)+?)(?: or |\n|$)", str(refused.value))
    assert texts(preprocess([row], "--fields", *first.split())) == [("Add. 2 2 4", "Add. 2 2 4")]
    assert texts(preprocess([row], "--fields", *second.split())) == texts(preprocess([ALPACA]))


def test_the_guide_lists_every_form():
    guide = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "data.md").read_text(encoding="utf-8")
    for form in FORMS:
        assert all(f"`{name}`" in guide for name in form.fields), form.name
