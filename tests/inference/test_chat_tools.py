"""Calls of tools in a chat: shown, answered, and laid out as the data has them."""

import json

import pytest
import torch

from inference.chats import after, tokens_of
from rwkv_peft.cli import commands
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.templates import segments
from rwkv_peft.data.tools import Call, calls_text, parse_calls

PARIS, NOON = {"name": "weather", "arguments": {"city": "Paris\n\nUser:"}}, {"name": "time", "arguments": {}}


def test_calls_of_tools_are_shown_and_answered_as_the_data_has_them(chat, model, tmp_path):
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"name": "weather"}, {"type": "function", "function": {"name": "time"}}]))
    called = {"role": "assistant", "content": "Well.", "tool_calls": [PARIS, NOON]}
    turns = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}, called]
    turns += [{"role": "tool", "content": text} for text in ("sun", "12")] + [{"role": "assistant", "content": ""}]
    laid_out = segments({"messages": turns, "tools": json.loads(tools.read_text())})
    answer = next(text for text, counts in laid_out if counts)
    lines = ["/tool early", "Hi", "/tool sun", "/tool 12", "/reset", "Hi"]
    says = [f"{answer}\n\nTool:", " Fine.|", " Yo|"]
    out, error, logits = chat(lines, "--tools", tools, "--system", "Be.", says=says)
    assert parse_calls(out.split("\n\nAssistant:")[0])[1] == [Call(**PARIS), Call(**NOON)]
    assert f"(call 1 of 2: {Call(**PARIS)}; /tool TEXT is its result)\n(call 2 of 2: " in error
    assert error.count("(call 2 of 2: its result?)") == 1 and error.count("/reset forgets the chat") == 2
    tokens = [token for text, _ in laid_out[:-1] for token in tokens_of(text)]
    torch.testing.assert_close(logits[len(says[0])], after(model, tokens), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[0], logits[len(says[0]) + len(says[1])], rtol=1e-4, atol=1e-4)


def test_a_call_that_was_only_thought_of_is_none(chat):
    thought = f">\n{calls_text(NOON)}"
    _, error, _ = chat(
        ["Hi", "So?"], "--think", "on", says=[f"{thought}|", f"{thought}\n</think>\n{calls_text(PARIS)}|"]
    )
    assert error.count("(call 1 of 1: ") == 1 and str(Call(**PARIS)) in error


@pytest.mark.parametrize(
    "content, message",
    [
        ("[1]", "--tools .*tools.json: a tool is 1; it needs a name"),
        ("x", "--tools .*tools.json: the list of tools is a text that is not JSON"),
        ("[]", "--tools .*tools.json lists no tool"),
        (None, "--tools .*tools.json: No such file or directory; check the name"),
    ],
)
def test_a_file_that_lists_no_tools_is_refused(model, tmp_path, content, message):
    if content is not None:
        (tmp_path / "tools.json").write_text(content)
    with pytest.raises(UserError, match=message):
        commands.main(["generate", "--model", str(model), "--chat", "--tools", str(tmp_path / "tools.json")])
