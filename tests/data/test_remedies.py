"""Every flag that a message or a note names is tried on the file that caused it, and helps."""

import re
import shlex

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.sources import build_samples

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
CASES = {
    "two answers": {"problem": "P", "solution": "S", "answer": "7"},
    "two questions": {"prompt": "P", "user": "S", "response": "7"},
    "two questions with spaces": {"user prompt": "P", "question text": "S", "final answer": "7"},
    "a score": {"prompt": "P", "response": "S", "score": 1},
    "a code beside a text": {"text": "Write it.", "code": "f()"},
    "alpaca with its text": {"instruction": "Q", "input": "", "output": "A", "text": "Q A"},
    "a text and a question": {"text": "T", "query": "Q", "response": "A"},
    "a pair": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "a pair of chats": {"chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    | {"rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}]},
    "a label": {"prompt": "Q", "completion": "A", "label": True},
    "names of nobody": {"foo": "Q", "bar": "A"},
    "a number beside a list": {"prompt": "P", "response": 2, "candidates": ["a", "b"]},
    "a system text beside a prompt": {"prompt": "P", "completion": "A", "system": "S"},
    "choices without a right one": {"question": "Q", "choices": ["a", "b"], "response": "none"},
    "lettered choices without a right one": {"question": "Q", "A": "a", "B": "b", "C": "c"},
    "thinking in a field": {"query": "Q", "response": "A", "reasoning": "R"},
    "thinking between marks": {
        "query": "Q",
        "response": "<|begin_of_thought|>T<|end_of_thought|><|begin_of_solution|>A<|end_of_solution|>",
    },
    "no thinking": ({"query": "Q", "response": "A"}, "--think", "on"),
    "calls of the other form": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": CALL}]},
    "turns in a question": {"instruction": "Human: Q\nAssistant: A\nHuman: R\nAssistant:", "output": "B"},
    "turns in a text file": "User: Q\n\nAssistant: A\n\nUser: R\n\nAssistant: B\n",
    "a text that begins as a result": {"query": "Function output:\n4", "response": "A"},
    "a field beside": {"query": "Q", "response": "A", "title": "T"},
    "a dialogue": "1.1.24, 8:00 - Ada: Hi\n1.1.24, 8:01 - Bo: Yes\n",
    "parts of a text": "One.\n***\nTwo.\n",
    "ends of texts": "One.<|endoftext|>Two.",
    "little of another encoding": "é\n".encode("cp1252"),
    "a table without names": "Hi,Yes\nBye,No\n",
    "bad rows": '{"query": "Q", "response": "A"}\n{"query": \n',
}
# what a message may name -> its words; capitals stand for the user's own
FLAGS = (
    r"--fields ((?:(?!or\b)[\w']+ ?)+)",
    r"--as '([^']+)'",
    *(rf"--{flag} ([\w-]+)" for flag in "encoding document_end think turns_in_text tool_form clean_turns".split()),
    r"--(skip_bad_rows)",
    r"--template (FILE|lays)",
)
FIELD = "write its letter into a field answer"  # a remedy in the row itself


def remedies(message, row, folder):
    """The flags, with their values, that a message names; a dict stands for fields to add to the row."""
    if FIELD in message:
        yield {"answer": "B"}
    for pattern in FLAGS:
        for value in re.findall(pattern, message):
            flag = re.match(r"--\(?(\w+)", pattern)[1]
            if flag == "skip_bad_rows":
                yield ["--skip_bad_rows"]
            elif flag == "template":
                (folder / "template").write_text(" ".join(f"{{{name}}}" for name in row))
                yield ["--template", str(folder / "template")]
            elif value.isupper():
                yield [f"--{flag}", *list(row)[: len(value.split())]]
            elif value != "names":  # --encoding names another
                yield [f"--{flag}", *shlex.split(value)]


@pytest.mark.parametrize("case", CASES)
def test_every_remedy_works_on_the_file_that_caused_its_message(preprocess, answers, tmp_path, capsys, case):
    content, *flags = CASES[case] if isinstance(CASES[case], tuple) else (CASES[case],)
    row = content if isinstance(content, dict) else {"Hi": "", "Yes": ""}
    name = "in.csv" if "table" in case else "in.jsonl" if isinstance(content, dict) or "rows" in case else "in.txt"
    content = [content] if isinstance(content, dict) else content

    def said(*flags, rows=content):
        try:
            preprocess(rows, *flags, name=name)
        except UserError as error:
            return str(error), True
        return "\n".join(line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")), False

    message, _ = said(*flags)
    flags_named = list(remedies(message, row, tmp_path))
    kinds = re.findall(r"train\.py --data_type (\w+)", message)
    assert flags_named or kinds, message
    for named in flags_named:
        again, refused = said(rows=[row | named]) if isinstance(named, dict) else said(*named)
        assert not refused and again != message, (named, again)
    for kind in kinds:
        assert len(build_samples(answers(kind)([row, row]), 257)) == 2
    capsys.readouterr()


def test_a_field_of_another_kind_is_named_in_words_of_json(preprocess):
    with pytest.raises(UserError, match="field 'mapping' holds an object, not text"):
        preprocess([{"mapping": {"a": 1}}], "--fields", "mapping")
