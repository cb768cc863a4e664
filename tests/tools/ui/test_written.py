"""Rows that are written on the page: in boxes, of a pasted chat, and of a text that is one."""

import json

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.tools.ui.files import Places
from rwkv_peft.tools.ui.written import EditedRows
from tools.ui.pages import go, press

expect = pytest.importorskip("playwright.sync_api", reason="needs the extra test").expect


def chat(*texts, roles=("user", "assistant")):
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_rows_are_written_edited_deleted_pasted_and_shown(open_page, folder):
    page, file = open_page(), folder / "my-rows.jsonl"
    go(page, "Rows")
    page.get_by_role("radio", name="pairs.jsonl").check()  # of another form: it stays as it is
    press(page, "Write rows")
    page.get_by_label("Question", exact=True).fill("几点了？")
    press(page, "Add this row")
    expect(page.get_by_text("Write each question and its answer first.")).to_be_visible()
    page.get_by_label("Answer", exact=True).fill("Noon.\nI think.")
    press(page, "Add this row")
    expect(page.get_by_role("textbox", name="Another file or folder")).to_have_value("my-rows.jsonl")
    expect(page.locator("mark").first).to_contain_text("Noon.")
    page.get_by_text("System text").first.click()
    page.get_by_label("System text").fill("Be brief.")
    press(page, "Another question and answer")
    for label, text in {"Question": "a", "Answer": "b", "Question 2": "c", "Answer 2": "d"}.items():
        page.get_by_label(label, exact=True).fill(text)
    press(page, "Add this row")
    expect(page.get_by_text("my-rows.jsonl holds 2 rows.")).to_be_visible()
    system = {"role": "system", "content": "Be brief."}
    assert rows_of(file) == [
        chat("几点了？", "Noon.\nI think."),
        {"messages": [system, *chat("a", "b", "c", "d")["messages"]]},
    ]
    page.get_by_role("button", name="Edit", exact=True).first.click()  # the newest row
    expect(page.get_by_label("Answer 2", exact=True)).to_have_value("d")
    page.get_by_label("Answer 2", exact=True).fill("e")
    press(page, "Save this row")
    expect(page.get_by_label("Answer", exact=True)).to_have_value("")
    assert rows_of(file)[1]["messages"][-1]["content"] == "e"
    page.get_by_role("button", name="Delete", exact=True).first.click()
    expect(page.get_by_text("my-rows.jsonl holds 1 rows.")).to_be_visible()
    page.get_by_text("Paste a whole chat").click()
    paste = page.get_by_label("Lines that begin with")
    paste.fill("hello")
    press(page, "Add the chat")
    expect(page.get_by_text("No chat was seen")).to_be_visible()
    paste.fill("User: Hi\nAssistant: Yes:\n\n1. one\n---\n**用户：** 好\n助手：好的")
    press(page, "Add the chat")
    expect(page.get_by_text("my-rows.jsonl holds 3 rows.")).to_be_visible()
    assert rows_of(file)[1:] == [chat("Hi", "Yes:\n\n1. one"), chat("好", "好的")]
    assert (folder / "pairs.jsonl").read_text().startswith('{"prompt"')


def test_a_text_of_turns_is_offered_as_rows(open_page, folder):
    (folder / "my-rows.jsonl").unlink(missing_ok=True)
    (folder / "chat.txt").write_text("User: Rain?\nAssistant: No.\nUser: Snow?\nAssistant: No.\n")
    page = open_page()
    go(page, "Rows")
    page.get_by_role("radio", name="chat.txt").check()
    press(page, "Take its turns as rows")
    expect(page.locator("mark").first).to_contain_text("No.")
    assert rows_of(folder / "my-rows.jsonl") == [chat("Rain?", "No.", "Snow?", "No.")]


def test_a_change_replaces_nothing_that_it_has_not_shown(tmp_path):
    edited, row = EditedRows(Places(tmp_path)), chat("a", "b")["messages"]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "other"}\r\n\nbroken \xff\n' + json.dumps(chat("a", "b")).encode())
    found = edited.rows("a.jsonl")
    assert found == {"path": "a.jsonl", "rows": [{"number": 3} | chat("a", "b")], "others": 2}
    was = found["rows"][0]["messages"]
    with pytest.raises(UserError, match="changed elsewhere"):
        edited.put("a.jsonl", 2, was, None)
    edited.put("a.jsonl", 3, was, chat("c", "d")["messages"])
    with pytest.raises(UserError, match="changed elsewhere"):
        edited.put("a.jsonl", 3, was, None)
    *others, last = (tmp_path / "a.jsonl").read_bytes().splitlines()
    assert others == [b'{"text": "other"}', b"", b"broken \xff"] and json.loads(last) == chat("c", "d")
    for name in ("a.txt", "none/a.jsonl", "../a.jsonl"):
        with pytest.raises(UserError):
            edited.put(name, None, None, row)
