"""Feedback is one file of rows: pairs read its corrections, labels its marks, chats what may be learned; it has no
field that nobody reads."""

import json

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.data import preprocess
from rwkv_peft.data.binidx import UNDESIRABLE
from rwkv_peft.data.encoding import EncodeSettings, Totals, encoder
from rwkv_peft.data.feedback import Answered, FeedbackFile, check_feedback_file
from rwkv_peft.data.report import laid_out, left_out
from rwkv_peft.data.tokenizer import load_tokenizer

HI, YO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
CALL = {"function": {"name": "f", "arguments": {}}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.fixture
def file(tmp_path):
    """A file with a correction, a good and a bad answer, and a corrected call of a tool."""
    feedback = FeedbackFile(str(tmp_path / "feedback.jsonl"), load_tokenizer("bytes"), 8)
    answered = Answered([HI], YO, "base.pth", "out/adapter.safetensors=0.7")
    feedback.correct(answered, " Hello ")
    feedback.judge(answered, True)
    feedback.judge(answered, False)
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    feedback.correct(Answered([HI], called, "base.pth", "", TOOLS), "No.")
    return feedback


def read(file, kind):
    """-> (the texts of each row's documents, the mask of the first, the lines of the report)."""
    totals, made = Totals(), encoder(EncodeSettings("bytes", command=kind))
    lines = open(file.path, "rb").read().splitlines()
    columns, items = made.columns(file.path, iter([(f"row {n}", line) for n, line in enumerate(lines)]), totals.counts)
    found = [row for place, item in items if (row := made.encode(place, item, totals, columns)) is not None]
    texts = []
    for row in found:
        tokens = list(memoryview(bytes(row.tokens)).cast("H"))
        ends = [sum(row.sizes[:n]) for n in range(len(row.sizes) + 1)]
        texts.append([made.tokenizer.decode(tokens[begin : end - 1]) for begin, end in zip(ends, ends[1:])])
    assert not totals.bad, totals.bad.first
    return texts, {max(row.mask) for row in found}, laid_out(totals) + left_out(totals)


def test_each_kind_of_rows_reads_what_it_can_learn(file):
    hello, yo = "User: Hi\n\nAssistant: Hello", "User: Hi\n\nAssistant: Yo"
    pairs, _, report = read(file, "pairs")
    assert pairs[0] == [hello, yo] and len(pairs) == 2 and "f" in pairs[1][1]
    assert all("System:" in document and document.count("Assistant:") == 1 for document in pairs[1])
    assert report == ["2 rows of feedback that this kind of rows does not learn from, left out"]
    labels, masks, report = read(file, "labels")
    assert labels == [[yo], [yo]] and masks == {1, UNDESIRABLE} and "2 rows of feedback" in report[-1]
    chats, _, report = read(file, "train")
    assert chats[:2] == [[hello], [yo]] and len(chats) == 3 and chats[2][0].endswith("Assistant: No.")
    assert report == ["1 row of feedback that this kind of rows does not learn from, left out"]


def test_the_command_preprocess_reads_feedback_as_chats(file, tmp_path, capsys):
    preprocess.main([file.path, "--output", str(tmp_path / "data"), "--tokenizer", "bytes"])
    told = capsys.readouterr().out
    assert "3 documents" in told and "not read" not in told


def test_rows_name_the_model_the_adapter_and_the_time(file):
    rows = [json.loads(line) for line in open(file.path)]
    assert {row["model"] for row in rows} == {"base.pth"} and rows[0]["adapter"] == "out/adapter.safetensors=0.7"
    assert all(row["time"].endswith("Z") for row in rows)
    assert rows[0]["chosen"] == "Hello" and rows[0]["rejected"] == "Yo" and rows[2]["label"] is False


@pytest.mark.parametrize(
    "text, message", [(" ", "is empty"), ("much too long", "13 tokens, and an answer has at most 8")]
)
def test_a_better_answer_has_words_and_no_more_tokens_than_an_answer(file, text, message):
    before = open(file.path).read()
    with pytest.raises(UserError, match=message):
        file.correct(Answered([HI], YO, "", ""), text)
    with pytest.raises(UserError, match="was cut off"):
        file.judge(Answered([HI], YO, "", "", whole=False), True)
    assert open(file.path).read() == before


def test_a_file_of_feedback_is_named_as_rows_are_and_is_no_input(file):
    with pytest.raises(UserError, match=r"--feedback notes\.txt: .*\.jsonl"):
        check_feedback_file("notes.txt", [])
    with pytest.raises(UserError, match="--feedback .* is the file given as --prompt_file"):
        check_feedback_file(file.path, [("--prompt_file", file.path)])
