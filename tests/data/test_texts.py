"""Encodings are recognized or asked for, and a file of several documents is cut where it is told to be."""

import json

import pytest

from data.documents import texts
from rwkv_peft.cli.errors import UserError

CHINESE = "人工智能是计算机科学的一个分支，它企图了解智能的实质。\n长城是世界文化遗产。\n请写一首关于春天的诗。\n"
TAIWANESE = "人工智慧是電腦科學的一個分支，它企圖了解智慧的實質。\n臺灣位於東亞，四面環海。\n請寫一首關於春天的詩。\n"
JAPANESE = "人工知能は計算機科学の一分野であり、知的な機械を作る研究です。\n春についての詩を書いてください。\n"
FRENCH = "Déjà vu à l'école, où naît l'été.\n"


@pytest.mark.parametrize("name", ["in.txt", "in.csv", "in.jsonl"])
@pytest.mark.parametrize(
    "encoding, text", [("gbk", CHINESE), ("gb18030", CHINESE), ("big5", TAIWANESE), ("shift_jis", JAPANESE)]
)
def test_an_encoding_of_several_bytes_is_recognized_and_its_first_line_is_shown(
    preprocess, capsys, name, encoding, text
):
    lines = text.splitlines()
    content = {
        "in.txt": text,
        "in.csv": "text\n" + text,
        "in.jsonl": "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines),
    }[name]
    data = preprocess(content.encode(encoding), "--no-append_eod", name=name)
    assert "".join(found for found, _ in texts(data)).replace("\n", "") == "".join(lines)
    said = capsys.readouterr().out
    assert f"{name} is read as " in said and ("first line: 'text'" if name == "in.csv" else lines[0][:20]) in said


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["in.txt", "in.csv", "in.jsonl", "in.json"])
def test_a_byte_order_mark_decides(preprocess, encoding, name):
    rows = {"in.jsonl": '{"text": "é"}\n', "in.json": '[{"text": "é"}]', "in.csv": "text\né\n", "in.txt": "é"}
    data = preprocess(rows[name].encode(encoding), "--no-append_eod", "--encoding", "cp1252", name=name)
    assert texts(data) == [("é", "é")]


@pytest.mark.parametrize("encoding, text", [("cp1252", FRENCH), ("gbk", "你好"), ("shift_jis", "東京")])
def test_a_guess_that_is_none_is_asked_for_and_the_flag_is_followed(preprocess, encoding, text):
    with pytest.raises(UserError, match=r"in\.txt: not UTF-8, and too little to tell its encoding by: name it"):
        preprocess(text.encode(encoding), name="in.txt")
    data = preprocess(text.encode(encoding), "--no-append_eod", "--encoding", encoding, name="in.txt")
    assert texts(data) == [(text, text)]


def test_a_wrong_encoding_is_a_message(preprocess):
    with pytest.raises(UserError, match=r"in\.txt: not shift_jis .*--encoding names its encoding"):
        preprocess(b"a\x82", "--encoding", "shift_jis", name="in.txt")
    with pytest.raises(UserError, match="'klingon' is no encoding of texts"):
        preprocess("a", "--encoding", "klingon", name="in.txt")


def test_one_damaged_byte_makes_no_other_encoding(preprocess):
    rows = [json.dumps({"text": line}, ensure_ascii=False) for line in CHINESE.splitlines()]
    content = ("\n".join(rows) + "\n").encode() + b'{"text": "\xff"}\n'
    with pytest.raises(UserError, match="line 4: not UTF-8"):
        preprocess(content)
    assert len(preprocess(content, "--skip_bad_rows")) == 3


@pytest.mark.parametrize(
    "name, mark, shown",
    [
        ("endoftext", "<|endoftext|>", "<|endoftext|>"),
        ("stars", "* * *", "a line of ***"),
        ("dashes", "-----", "a line of ---"),
    ],
)
def test_marks_between_documents_are_offered_and_followed(preprocess, capsys, name, mark, shown):
    content = f"One - two.\n{mark}\nThree ** four.\n{mark}\n"
    assert len(preprocess(content, name="in.txt")) == 1
    said = capsys.readouterr().out
    assert f"in.txt is one document, and holds {shown} 2 times; --document_end {name} makes a document of each" in said
    data = preprocess(content, "--no-append_eod", "--document_end", name, name="in.txt")
    assert [text for text, _ in texts(data)] == ["One - two.\n", "Three ** four.\n"]
    assert "--document_end" not in capsys.readouterr().out
    assert len(preprocess(content, "--document_end", name, "--split", "[1:]", name="in.txt")) == 1
