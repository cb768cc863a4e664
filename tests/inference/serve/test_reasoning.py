"""Thinking: its modes reach the model as RWKV-7 G1 was prompted, it begins, and it is reported beside the answer.

The server's model writes one text of World's tokens, each behind the one before it: a thinking and an answer. Best it
would like to close the thinking at once.
"""

import io
import sys
from typing import get_args

import pytest
import torch
from serving import Server

from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.cli import commands
from rwkv_peft.cli.names import THINK_MODES
from rwkv_peft.data.chat import THINK
from rwkv_peft.data.tokenizer import BytesTokenizer, load_tokenizer
from rwkv_peft.inference.loading import load_model
from rwkv_peft.inference.serve.requests import ChatBody, Mode
from rwkv_peft.inference.serve.responses import ChatResponse, CompletionPart
from rwkv_peft.inference.thinking import ThinkingStream

HI = [{"role": "user", "content": "Hi"}]
CHAIN = ["think", '>"', "So", "?", "</", "th", "ink", ">", "\n", "Yo"]  # no token twice


@pytest.fixture(scope="module")
def scripted(tmp_path_factory, tiny_state):
    """The path of a model of the World vocabulary that writes CHAIN behind "<think", and likes to close it better."""
    world, state = load_tokenizer("world"), tiny_state(vocab_size=65536)
    for key, tensor in state.items():
        if key.endswith(("att.output.weight", "ffn.value.weight", ".bias")):
            tensor.zero_()  # what comes next depends on the last token alone
    tokens = [token for text in CHAIN for token in world.encode(text)]
    assert len(tokens) == len(CHAIN) == len(set(tokens))
    state["emb.weight"][tokens] = torch.eye(64)[: len(tokens)].sub(0.5) * 4
    state["head.weight"].zero_()
    path = tmp_path_factory.mktemp("scripted") / "base.pth"
    save_model(path, state)
    model = load_model(path)[0]
    before = model.ln_out(model.blocks[0].ln0(model.emb(torch.tensor(tokens)))).detach()
    after = torch.tensor([*tokens[1:], 0])
    state["head.weight"][after] = before * 4
    for token in world.encode("></") + world.encode("</"):
        state["head.weight"][token] += before[0] * 8
    save_model(path, state)
    return path


@pytest.fixture(scope="module")
def server(scripted):
    running = Server("--model", scripted, "--max_tokens", 40)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def ask(server):
    """ask(**fields) -> the chat's completion, by the official client."""
    pytest.importorskip("openai")
    with server.client() as client:

        def ask(messages=HI, **fields):
            own = {name: fields.pop(name) for name in [*fields] if name not in ("stream", "max_tokens", "n")}
            return client.chat.completions.create(
                model="base", messages=messages, temperature=0, extra_body=own, **fields
            )

        yield ask


FIELDS = [
    *(({"think": mode}, mode) for mode in THINK),
    *(({"reasoning_effort": mode}, mode) for mode in ("minimal", "low", "medium", "high")),
    *(({"reasoning_effort": effort}, mode) for effort, mode in (("none", "off"), ("xhigh", "high"), ("max", "high"))),
    *(({"chat_template_kwargs": {"enable_thinking": on}}, "on" if on else "off") for on in (True, False)),
    ({"chat_template_kwargs": {"think": "low", "enable_thinking": False}}, "low"),
    ({"chat_template_kwargs": {"reasoning_effort": "none", "enable_thinking": True}}, "off"),
    ({"think": "on", "reasoning_effort": "low"}, "on"),
    *(({"enable_thinking": on}, "on" if on else "off") for on in (True, False)),
    *(
        ({"thinking_budget": most}, mode)
        for most, mode in ((0, "off"), (1024, "low"), (4096, "medium"), (9999, "high"))
    ),
    ({"enable_thinking": False, "thinking_budget": 4096}, "off"),
    *(({"thinking": {"type": kind}}, mode) for kind, mode in (("enabled", "on"), ("disabled", "off"))),
    ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "medium"),
    *(({"reasoning": {"effort": effort}}, mode) for effort, mode in (("low", "low"), ("none", "off"))),
    *(({"reasoning": fields}, mode) for fields, mode in (({"enabled": True}, "on"), ({"max_tokens": 100}, "low"))),
    *(({"chat_template_kwargs": {"thinking": on}}, "on" if on else "off") for on in (True, False)),
]


@pytest.mark.parametrize("fields, mode", FIELDS)
def test_a_clients_fields_set_the_mode_as_g1_was_prompted(ask, fields, mode):
    world, (words, opening) = load_tokenizer("world"), THINK[mode]
    for own in ("", " (think a lot)"):
        found = ask([{"role": "user", "content": f"Hi{own}"}], **fields, max_tokens=1)
        prompt = "User:", f" Hi{own or words}\n\n", f"Assistant:{opening}"
        assert found.usage.prompt_tokens == sum(len(world.encode(text)) for text in prompt)
    assert get_args(Mode) == tuple(THINK) == THINK_MODES
    assert ChatBody(messages=[*HI, {"role": "assistant", "content": "Well,"}], **fields).mode == ""


@pytest.mark.parametrize("mode", [mode for mode in THINK if THINK[mode].thinks])
def test_a_thinking_begins_and_is_reported_beside_the_answer(ask, mode):
    for found in ask(think=mode, n=2).choices:
        assert (found.message.reasoning_content, found.message.content) == ('"So?', "Yo")
    whole = ask(think=mode)
    assert whole.usage.completion_tokens == len(CHAIN) and whole.choices[0].finish_reason == "stop"
    streamed = [*ask(think=mode, stream=True, stream_options={"include_usage": True})]
    usages = whole.usage, streamed.pop().usage
    thought = [usage.completion_tokens_details.reasoning_tokens for usage in usages]
    assert thought == [CHAIN.index("\n") - 1] * 2  # "think" is the prompt's
    deltas = [part.choices[0].delta for part in streamed]
    thought = [getattr(delta, "reasoning_content", None) for delta in deltas]
    assert "".join(filter(None, thought)) == '"So?' and "".join(delta.content or "" for delta in deltas) == "Yo"
    assert deltas[0].role == "assistant" and not any(one and delta.content for one, delta in zip(thought, deltas))
    cut = ask(think=mode, max_tokens=3).choices[0]
    assert (cut.message.reasoning_content, cut.message.content, cut.finish_reason) == ('"So?', "", "length")


def test_a_thinking_stays_in_the_words_if_that_is_asked(ask):
    for fields in ({"reasoning_format": "none"}, {"reasoning_format": "none", "stream": True}):
        found = ask(think="on", **fields)
        parts = [part.choices[0].delta for part in found] if "stream" in fields else [found.choices[0].message]
        assert "".join(part.content for part in parts) == '<think>"So?</think>\nYo'
        assert not any(hasattr(part, "reasoning_content") for part in parts)


def test_the_thinking_of_earlier_answers_is_left_out(ask):
    answer = {"role": "assistant", "content": "Yo", "reasoning_content": "So?"}
    plain = {"role": "assistant", "content": "Yo"}
    counts = [ask([*HI, one, *HI], think="low", max_tokens=1).usage.prompt_tokens for one in (answer, plain)]
    assert counts[0] == counts[1]


TEXTS = {
    "<think>\nhm, < </thin\n</think>\n\nYo": ("hm, < </thin", "Yo"),
    " <think>a\n\nb </think>c <think>d</think>": ("a\n\nb", "c <think>d</think>"),
    "<think>\nhm</thi": ("hm</thi", ""),
    "<think>\n \n</think> Yo": ("", "Yo"),
    "<thinker> says": ("", "<thinker> says"),
    "<thi": ("", "<thi"),
    "Yo </think>": ("", "Yo </think>"),
    "": ("", ""),
}


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_is_split_alike_in_any_pieces(text):
    for width in (1, 2, 3, 7, 100):
        stream = ThinkingStream()
        parts = [stream.feed(text[begin : begin + width]) for begin in range(0, len(text), width)]
        parts.append(stream.feed("", whole=True))
        assert tuple(map("".join, zip(*parts))) == TEXTS[text]


def test_tools_are_called_behind_a_thinking():
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    text = f"<think>\nI might {call}\n</think>\nWell.\n{call}"
    response = ChatResponse("m", BytesTokenizer(), False, True, splits=True)
    message = response.choice(response.split_part(CompletionPart(0, text, (), "stop")))
    assert message["finish_reason"] == "tool_calls" and len(message["message"]["tool_calls"]) == 1
    assert (message["message"]["reasoning_content"], message["message"]["content"]) == (f"I might {call}", "Well.")
    response = ChatResponse("m", BytesTokenizer(), False, True, splits=True)
    pieces = [*(CompletionPart(0, letter, ()) for letter in text), CompletionPart(0, "", (), "stop")]
    parts = [response.delta(response.split_part(piece), False) for piece in pieces]
    parts = [part["delta"] for part in parts if part]
    assert "".join(part.get("reasoning_content", "") for part in parts) == f"I might {call}"
    assert "".join(part.get("content", "") for part in parts) == "Well."
    assert [len(part["tool_calls"]) for part in parts if "tool_calls" in part] == [1]


def test_a_texts_prompt_leaves_the_choice_to_the_model(server):
    body = {"prompt": "User: Hi\n\nAssistant: <think", "max_tokens": 1, "temperature": 0}
    assert server.send("POST", "/v1/completions", body)[2]["choices"][0]["text"] == "></"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_shows_where_a_thinking_ends(scripted, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    flags = ("--chat", "--think", "low", "--temperature", "0")
    assert commands.main(["generate", "--model", str(scripted), *flags]) == 0
    dim, plain = ("\x1b[2m", "\x1b[22m") if terminal else ("", "")
    assert capsys.readouterr().out == f'Assistant:{dim} <think>"So?</think>{plain}\nYo\n\n'
