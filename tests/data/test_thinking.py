"""Chats with thinking: an answer opens as in RWKV-7 G1's prompts, with the same tokens, or the flags are refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from data.documents import chat, marked
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import DataConfig
from rwkv_peft.config.data import think_bounds
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.data.chat import THINK
from rwkv_peft.data.encoding import EncodeSettings, Totals, encoder
from rwkv_peft.data.layouts import RowLayout
from rwkv_peft.data.preprocess import main
from rwkv_peft.data.sources import prepare_sft
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.data.tools import TOOL_FORMS


@pytest.fixture
def preprocess(tmp_path):
    """preprocess(rows, *flags) -> the text of each document in byte tokens, with [[ ]] around the parts that count."""

    def run(rows, *flags):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        prefix = str(tmp_path / "data")
        assert main([str(tmp_path / "in.jsonl"), "--output", prefix, "--tokenizer", "bytes", *flags]) == 0
        data, decode = BinidxDataset(prefix), load_tokenizer("bytes").decode
        masks = [data.mask[data.start(i) : data.start(i) + len(data[i])].tolist() for i in range(len(data))]
        rows = [zip(map(decode, zip(row.tolist())), mask) for row, mask in zip(data, masks)]
        return [marked(row) for row in rows]

    return run


@pytest.mark.parametrize(
    "row, think, expected",
    [
        (chat("Q", "<think>\nhm\n</think>\n\nA"), "on", "Assistant: <think[[>\nhm\n</think>\nA]]"),
        (chat("Q", "<think>hm</think>A"), "on", "Assistant: <think[[>hm</think>\nA]]"),
        (
            chat(
                "Q", "<|begin_of_thought|>\n\nhm\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\nA<|end_of_solution|>"
            ),
            "on",
            "Assistant: <think[[>\nhm\n</think>\nA]]",
        ),
        (chat("Q", "<think>hm</think>A"), "off", "Assistant: <think></think[[>\nA]]"),
        (chat("Q", "<think>hm</think>A"), "", "Assistant:[[ <think>hm</think>A]]"),
        (chat("Q", "A"), "off", "Assistant: <think></think[[>\nA]]"),
        ({"query": "Q", "response": "A", "thinking": " hm "}, "on", "Assistant: <think[[>\nhm\n</think>\nA]]"),
        (chat("Q", "A", reasoning_content="hm"), "on", "Assistant: <think[[>\nhm\n</think>\nA]]"),
        (
            chat("Q", "A", "R", "<think>hm</think>B"),
            "on",
            "Assistant:[[ A\n\nUser:]] R\n\nAssistant: <think[[>hm</think>\nB]]",
        ),
    ],
)
def test_thinking_is_opened_as_g1_is_asked(row, think, expected):
    assert marked(RowLayout(think).segments(row)) == f"User: Q\n\n{expected}"


def test_fields_and_templates_have_thinking_too(preprocess):
    row = {"q": "Q", "query": "Q", "a": "<think>\nhm\n</think>\nA", "response": "A", "reasoning": "hm"}
    for think, template in (("on", "think"), ("off", "no-think")):
        made = preprocess([row], "--fields", "q", "a", "--think", think)
        assert made == preprocess([row], "--template", template) and "<think" in made[0]


def test_what_a_prompt_gives_has_the_tokens_of_the_prompt():
    world, prompt = load_tokenizer("world"), "User: Q。\n\nAssistant: <think"
    given = chat("Q。", "<think>hm</think>好。", "R", "<think>m</think>S")
    made = encoder(EncodeSettings("world", think="on")).encode("x", given, Totals())
    tokens = np.frombuffer(made.tokens, dtype=np.uint16).tolist()
    counts = list(made.mask)
    asked = world.encode(prompt)
    assert tokens[: len(asked)] == asked and not any(counts[: len(asked)])
    end = tokens.index(261, len(asked))  # behind the assistant's turn, and nowhere before
    assert world.decode(tokens[len(asked) : end]) == ">hm</think>\n好。"
    assert world.decode(tokens[end : end + 3]) == "\n\nUser:" and counts[end : end + 4] == [1, 1, 1, 0]
    assert tokens[-1] == 0 and counts[-1] == 1


def test_each_row_is_laid_out_by_what_it_holds_and_both_are_counted(preprocess, capsys):
    thinking, plain = chat("Q", "<think>hm</think>A"), chat("Q", "A", "R", "B")
    empty = {"query": "Q", "response": "A", "reasoning": ""}
    made = preprocess([thinking, plain, empty], "--think", "on")
    assert "\n1 row with thinking, 2 without (<think></think)\n" in capsys.readouterr().out
    assert made == preprocess([thinking], "--think", "on") + preprocess([plain, empty], "--think", "off")


@pytest.mark.parametrize("given", ([5], [20, 9], [0, 4], [1, 2, 3]))
def test_bounds_that_are_not_two_in_order_are_refused(given):
    shown = " ".join(map(str, given))
    with pytest.raises(UserError, match=f"^--think_labels {shown}: it is two numbers of tokens, the smaller one first"):
        think_bounds(given)


@pytest.mark.parametrize("given", ([1], [9, 20], [5, 5]))
@pytest.mark.parametrize("bound, more, words", [(0, -1, "low"), (0, 0, "medium"), (1, 0, "medium"), (1, 1, "high")])
def test_a_thinking_is_labelled_by_its_length(given, bound, more, words):
    bounds = think_bounds(given)
    tokens, words = bounds[bound] + more, THINK[words].words
    labelled = encoder(EncodeSettings("bytes", think="on", think_labels=bounds)).documents
    thought, row = f"<think>{'h' * tokens}</think>A", {"role": "tool", "content": "3"}
    due = f"User: Q{words}\n\nAssistant: <think[[>{'h' * tokens}</think>\nA"
    assert marked(labelled({"query": "Q", "response": thought})[0]) == f"{due}]]"
    assert labelled({"query": f"Q{words}", "response": thought}) == labelled({"query": "Q", "response": thought})
    turns = chat("Q", thought, "R", "B", "S", thought)["messages"]
    once = (
        f"{due}\n\nUser:]] R\n\nAssistant:[[ B\n\nUser:]] S{words}\n\nAssistant: <think[[>{'h' * tokens}</think>\nA]]"
    )
    assert marked(labelled({"messages": turns})[0]) == once
    for form in TOOL_FORMS.values():
        labelled = encoder(EncodeSettings("bytes", think="on", think_labels=bounds, tool_form=form.name)).documents
        begin = f"{form.speaker}:]] {form.result}3"
        result = marked(labelled({"messages": [*turns, row, turns[-1]]})[0]).partition(begin)[2]
        assert result.startswith("\n\nAssistant: <think[[>h"), "a turn of a tool gets none"
    assert labelled(chat("Q", "A")) == encoder(EncodeSettings("bytes", think="on")).documents(chat("Q", "A"))


def test_a_run_that_reads_rows_tells_both_too(tmp_path):
    rows = [chat("Q", "<think>hm</think>A"), chat("Q", "A")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "in.jsonl")
    config = DataConfig(path=path, data_type="sft", tokenizer="bytes", sft_think="on", dataload="pad")
    prefix, notes = prepare_sft(config, tmp_path / "cache")
    assert len(BinidxDataset(prefix)) == 2 and notes == ["1 row with thinking, 1 without (<think></think)"]


@pytest.mark.parametrize(
    "row, flags, message",
    [
        (chat("Q", "A"), ["--think", "on"], "in.jsonl: no row holds thinking, neither <think> … </think> before"),
        (chat("Q", "<think> </think>A"), ["--think", "on"], "give --think off (train.py: --sft_think off)"),
        (chat("Q", "<think>hm"), ["--think", "on"], "line 1: an answer opens <think> and has no </think>"),
        ({"text": "t"}, ["--think", "off"], "line 1: only answers of chats"),
        ({"prompt": "a", "completion": "b"}, ["--think", "off"], "line 1: only answers of chats"),
        ({"a": "b"}, ["--think", "on", "--fields", "a"], "two are a prompt and its answer, which thinking needs"),
        ({"query": "Q", "response": "A"}, ["--think", "on", "--template", "chat"], "--think on: both open an answer"),
    ],
)
def test_thinking_that_has_no_place_is_refused(preprocess, row, flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        preprocess([row], *flags)


def test_the_documented_ways_are_those_of_the_code():
    page = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "data.md").read_text(encoding="utf-8")
    for think in ("", "on", "off"):
        text = marked(RowLayout(think).segments({"query": "2+2?", "response": "4", "reasoning": "2 and 2."}))
        answer = text.removeprefix("User: 2+2?\n\n").replace("\n", "⏎")
        assert f"| `{answer}` | {f'`{think}`' if think else ''} |".replace("|  |", "| |") in page
    for name, (words, opening) in THINK.items():
        shown = opening.strip().replace("\n", "⏎")
        assert f"| `{name}` | {f'`{words.strip()}`' if words else ''} | `{shown}` |".replace("|  |", "| |") in page
