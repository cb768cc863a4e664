"""Other protocols are answered as OpenAI's is: their clients' bodies, streams and mistakes.

The bodies follow the types of the packages that docs/guides/serving.md names, and clients' documented fields.
"""

import json

import pytest
from fastapi.exceptions import RequestValidationError
from serving import Server
from test_guard import HOSTILE

from rwkv_peft.data.tools import ToolCall
from rwkv_peft.inference.serve import anthropic, ollama, openai_responses
from rwkv_peft.inference.serve.anthropic import MessageResponse
from rwkv_peft.inference.serve.ollama import OllamaResponse
from rwkv_peft.inference.serve.openai_responses import ItemResponse
from rwkv_peft.inference.serve.requests import ChatBody
from rwkv_peft.inference.serve.responses import CompletionPart, Usage
from rwkv_peft.inference.serve.web import RequestError

MOST = 8  # tokens of an answer
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"day": {"enum": [1, 2]}}, "required": ["day"], "additionalProperties": False}
FUNCTION = {"name": "weather", "description": "It tells.", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CHAT, GENERATE, MESSAGES, RESPONSES = "/api/chat", "/api/generate", "/v1/messages", "/v1/responses"
GREEDY = {"temperature": 0}
CALLED = [
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"day": 1}}}]}
]
CALLED = [*TURNS, *CALLED, {"role": "tool", "tool_name": "weather", "content": "wet"}]
BLOCKS = [
    {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "So.", "signature": ""},
            {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"day": 1}},
        ],
    },
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "wet"}]}],
    },
]
ITEMS = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    {"type": "reasoning", "id": "rs_1", "summary": []},
    {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"day": 1}'},
    {"type": "function_call_output", "call_id": "c1", "output": "wet"},
]
SYSTEM = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
BODIES = {  # name -> (path, body, the chat that it means)
    "ollama-python 0.6.3": (
        CHAT,
        {"model": "base:latest", "stream": False, "options": GREEDY | {"num_ctx": 2048, "num_predict": -1}}
        | {"messages": TURNS, "tools": [], "keep_alive": "5m"},
        {"messages": TURNS},
    ),
    "Open WebUI, a model of Ollama": (
        CHAT,
        {"model": "base", "messages": TURNS, "stream": True, "think": False, "keep_alive": "5m"}
        | {"options": GREEDY | {"repeat_last_n": 64, "repeat_penalty": 1, "num_gpu": 0, "use_mmap": True}},
        {"messages": TURNS, "think": "off"},
    ),
    "Ollama, with tools": (
        CHAT,
        {"model": "base", "messages": CALLED, "tools": [TOOL], "stream": True, "options": GREEDY},
        {"messages": CALLED, "tools": [TOOL]},
    ),
    "Continue, a completion of Ollama": (
        GENERATE,
        {"model": "base", "prompt": "Hi", "system": "Be brief.", "raw": False, "suffix": "", "keep_alive": 1800}
        | {"options": GREEDY | {"num_thread": 4, "mirostat": 0}, "stream": True},
        {"messages": TURNS},
    ),
    "anthropic-sdk-python 2.16.0": (
        MESSAGES,
        {"model": "base", "max_tokens": 1024, "messages": TURNS[1:], "system": "Be brief.", **GREEDY},
        {"messages": TURNS},
    ),
    "Claude Code": (
        MESSAGES,
        {"model": "base", "max_tokens": 32000, "messages": BLOCKS, "system": SYSTEM, "stream": True, **GREEDY}
        | {
            "tools": [{"name": "weather", "description": "It tells.", "input_schema": SCHEMA}],
            "metadata": {"user_id": "u"},
        }
        | {"thinking": {"type": "enabled", "budget_tokens": 2000}, "tool_choice": {"type": "auto"}}
        | {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"messages": CALLED, "tools": [TOOL], "think": "medium"},
    ),
    "openai-python 3.57, responses": (
        RESPONSES,
        {"model": "base", "input": "Hi", "instructions": "Be brief.", "store": False, **GREEDY},
        {"messages": TURNS},
    ),
    "Codex": (
        RESPONSES,
        {"model": "base", "instructions": "Be brief.", "input": ITEMS, "stream": True, "store": False, **GREEDY}
        | {"tools": [{"type": "function", "strict": False, **FUNCTION}], "tool_choice": "auto", "include": []}
        | {"parallel_tool_calls": False, "prompt_cache_key": "x", "reasoning": {"effort": "low", "summary": "auto"}},
        {"messages": CALLED, "tools": [TOOL], "reasoning_effort": "low"},
    ),
}


@pytest.fixture(scope="module")
def alone(files):
    """A server of a base and an adapter, with short answers."""
    running = Server(*("--model", files / "base.pth", "--adapter", files / "poet.safetensors", "--max_tokens", MOST))
    yield running
    running.stop()


def test_feedback_is_refused_by_a_server_without_a_file_for_it(alone):
    status, _, body = alone.send("POST", "/v1/feedback", {"id": "chatcmpl-1", "mark": "good"})
    assert status == 403 and "--feedback FILE.jsonl" in body["error"]["message"]


def read(path, found):
    """The objects of a response: one, those of lines, or of events."""
    if isinstance(found, dict):
        return [found]
    if path.startswith("/api/"):
        return [json.loads(line) for line in found.splitlines()]
    events = [event.splitlines() for event in found.split("\n\n") if event]
    objects = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name for name, _ in events] == [f"event: {each['type']}" for each in objects]
    return objects


def words(path, objects):
    """(thinking, words) of a response."""
    if path in (CHAT, GENERATE):
        parts = [each.get("message", each) for each in objects]
        return tuple(
            "".join(part.get(name) or "" for part in parts)
            for name in ("thinking", objects[0].get("response") is None and "content" or "response")
        )
    if len(objects) > 1:
        kinds = {
            MESSAGES: ("thinking_delta", "text_delta"),
            RESPONSES: ("response.reasoning_text.delta", "response.output_text.delta"),
        }
        deltas = [each["delta"] if path == MESSAGES else each for each in objects if "delta" in each]
        texts = [
            [one.get("text") or one.get("thinking") or one.get("delta") for one in deltas if one.get("type") == kind]
            for kind in kinds[path]
        ]
        return tuple(map("".join, texts))
    blocks = objects[0]["content" if path == MESSAGES else "output"]
    if path == RESPONSES:
        blocks = [{**part, "thinking": part["text"]} for item in blocks for part in item["content"]]
    texts = [
        [one[name] for one in blocks if one["type"] == kind]
        for name, kinds in (("thinking", ("thinking", "reasoning_text")), ("text", ("text", "output_text")))
        for kind in kinds
    ]
    return "".join(sum(texts[:2], [])), "".join(sum(texts[2:], []))


@pytest.mark.parametrize("client", BODIES)
def test_a_clients_request_is_answered_as_the_chat_that_it_means(alone, client):
    path, body, chat = BODIES[client]
    status, _, due = alone.send("POST", "/v1/chat/completions", {"model": "base", **chat, **GREEDY})
    assert status == 200, due
    status, headers, found = alone.send("POST", path, body)
    assert status == 200, found
    objects, message = read(path, found), due["choices"][0]["message"]
    assert words(path, objects) == (message.get("reasoning_content", ""), message["content"])
    usage = due["usage"]["prompt_tokens"], due["usage"]["completion_tokens"]
    last = objects[-1]
    if path.startswith("/api/"):
        assert last["done"] and last["done_reason"] == "length"
        assert (last["prompt_eval_count"], last["eval_count"]) == usage
    elif path == MESSAGES:
        whole = objects[-2] if body.get("stream") else last
        assert (whole["delta"] if body.get("stream") else whole)["stop_reason"] == "max_tokens"
        tokens = whole["usage"]
        assert (tokens["input_tokens"] + tokens["cache_read_input_tokens"], tokens["output_tokens"]) == usage
    else:
        whole = last["response"] if body.get("stream") else last
        assert whole["status"] == "incomplete" and whole["incomplete_details"] == {"reason": "max_output_tokens"}
        assert (whole["usage"]["input_tokens"], whole["usage"]["output_tokens"]) == usage


def test_clients_of_ollama_find_the_models(alone):
    names = {model["name"] for model in alone.send("GET", "/api/tags")[2]["models"]}
    assert (
        names == {"base:latest", "poet:latest"} == {one["model"] for one in alone.send("GET", "/api/ps")[2]["models"]}
    )
    assert alone.send("GET", "/api/version")[2]["version"]
    for name in ("base", "poet:latest"):
        shown = alone.send("POST", "/api/show", {"model": name})[2]
        assert shown["details"]["family"] == shown["model_info"]["general.architecture"] == "rwkv6"
        assert {"completion", "tools", "thinking"} <= {*shown["capabilities"]}
    for path, field in ((CHAT, "message"), (GENERATE, "response")):
        loaded = alone.send("POST", path, {"model": "poet", "keep_alive": 0})[2]
        assert loaded["done_reason"] == "unload" and field in loaded


def test_a_prompt_that_is_laid_out_already_is_continued(alone):
    raw = {"model": "base", "prompt": "Once", "raw": True, "stream": False, "options": GREEDY}
    text = {"model": "base", "prompt": "Once", "max_tokens": MOST, **GREEDY}
    due = alone.send("POST", "/v1/completions", text)[2]["choices"][0]["text"]
    assert alone.send("POST", GENERATE, raw)[2]["response"] == due
    short = alone.send("POST", GENERATE, raw | {"options": {**GREEDY, "num_predict": 2}})[2]
    assert short["eval_count"] == 2 and due.startswith(short["response"])


FORMED = {
    CHAT: {"messages": TURNS, "format": SCHEMA, "stream": False},
    GENERATE: {"prompt": "Hi", "format": SCHEMA, "stream": False},
    MESSAGES: {
        "messages": TURNS[1:],
        "max_tokens": 8,
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    },
    RESPONSES: {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "day", "schema": SCHEMA}}},
}


@pytest.fixture(scope="module")
def longer(files):
    """A server whose answers are long enough for a call of a tool."""
    running = Server("--model", files / "base.pth", "--max_tokens", 200)
    yield running
    running.stop()


@pytest.mark.parametrize("path", FORMED)
def test_an_answer_is_held_to_its_schema(longer, path):
    body = FORMED[path] | {"max_tokens": 200} if path == MESSAGES else FORMED[path]
    status, _, found = longer.send("POST", path, {"model": "base", **body})
    assert status == 200 and json.loads(words(path, [found])[1]) in ({"day": 1}, {"day": 2})


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_is_reported_in_the_protocols_form(longer, stream):
    tools = [{"name": "weather", "input_schema": SCHEMA}]
    body = {"model": "base", "max_tokens": 200, "messages": TURNS[1:], "tools": tools, "stream": stream}
    objects = read(MESSAGES, longer.send("POST", MESSAGES, body | {"tool_choice": {"type": "any"}})[2])
    if stream:
        assert [each["type"] for each in objects] == [
            *("message_start", "content_block_start", "content_block_delta", "content_block_stop"),
            *("message_delta", "message_stop"),
        ]
        assert objects[1]["content_block"]["name"] == "weather" and objects[1]["content_block"]["input"] == {}
        assert json.loads(objects[2]["delta"]["partial_json"])["day"] in (1, 2)
        assert objects[4]["delta"]["stop_reason"] == "tool_use"
    else:
        (block,) = objects[0]["content"]
        assert block["type"] == objects[0]["stop_reason"] == "tool_use" and block["input"]["day"] in (1, 2)


def test_the_official_client_reads_responses(longer):
    pytest.importorskip("openai")
    with longer.client() as client:
        ask = {"model": "base", "input": "Hi", "tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"}
        (call,) = client.responses.create(**ask).output
        assert call.type == "function_call" and json.loads(call.arguments)["day"] in (1, 2)
        events = [
            *client.responses.create(model="base", input="Hi", temperature=0, max_output_tokens=MOST, stream=True)
        ]
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        final = events[-1].response
        assert final.output_text == text and final.status == "incomplete" and final.usage.output_tokens == MOST


@pytest.mark.parametrize("form", [OllamaResponse, MessageResponse, ItemResponse])
def test_a_stream_holds_what_the_whole_answer_does(form):
    """A thinking, words and calls, in pieces of a letter each."""
    from rwkv_peft.data.tokenizer import BytesTokenizer

    calls, usage = (ToolCall("f", {"a": "é"}), ToolCall("g", {})), Usage(3, 1, 9, 2)
    whole, stream = (form("m", BytesTokenizer(), False, True, False, True) for _ in range(2))
    due = whole.whole([CompletionPart(0, "Well.", (), "stop", "hm", calls)], usage)
    pieces = [CompletionPart(0, "", (), thinking=letter) for letter in "hm"]
    pieces += [CompletionPart(0, letter, ()) for letter in "Well."] + [CompletionPart(0, "", (), "stop", calls=calls)]
    data = [*stream.begin(usage), *(one for piece in pieces for one in stream.events(piece)), *stream.ending(usage)]
    found = b"".join(data).decode()
    if form is OllamaResponse:
        lines = [json.loads(line) for line in found.splitlines()]
        message = due["message"]
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["f", "g"]
        assert "".join(line["message"].get("thinking", "") for line in lines) == message["thinking"] == "hm"
        assert "".join(line["message"]["content"] for line in lines) == message["content"] == "Well."
        assert [line["message"]["tool_calls"] for line in lines if "tool_calls" in line["message"]] == [
            message["tool_calls"]
        ]
        return
    events = read(MESSAGES, found)
    if form is ItemResponse:
        assert [each["sequence_number"] for each in events] == list(range(len(events)))
        items = events[-1]["response"]["output"]
        assert events[-1]["type"] == "response.completed"
        assert [each["item"] for each in events if each["type"] == "response.output_item.done"] == items
        hidden = [{**item, "id": 0, "call_id": 0} for item in items]
        assert hidden == [{**item, "id": 0, "call_id": 0} for item in due["output"]]
        assert [item["type"] for item in items] == ["reasoning", "message", "function_call", "function_call"]
        return
    kinds = [each["content_block"]["type"] for each in events if each["type"] == "content_block_start"]
    assert kinds == [block["type"] for block in due["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert [each["index"] for each in events if each["type"] == "content_block_stop"] == [0, 1, 2, 3]
    assert events[-2]["delta"]["stop_reason"] == due["stop_reason"] == "tool_use"


def test_the_stop_sequence_is_named(alone):
    chat = {"model": "base", "messages": TURNS[1:], **GREEDY}
    text = alone.send("POST", "/v1/chat/completions", chat)[2]["choices"][0]["message"]["content"]
    found = alone.send("POST", MESSAGES, chat | {"max_tokens": 8, "stop_sequences": ["never", text[2:4]]})[2]
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", text[2:4])


MISTAKES = [
    (CHAT, {"messages": TURNS, "model": "absent"}, 404),
    (CHAT, {"messages": TURNS, "options": {"tempreature": 1}}, 400),
    (CHAT, {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400),
    (CHAT, {"messages": TURNS, "format": "xml"}, 400),
    (GENERATE, {"prompt": "x", "suffix": "y"}, 400),
    (MESSAGES, {"max_tokens": 8}, 400),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400),
    (MESSAGES, {"messages": TURNS, "tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 400),
    (RESPONSES, {"input": "x", "previous_response_id": "resp_1"}, 400),
    (RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, 400),
    *((path, b"{", 400) for path in (CHAT, GENERATE, MESSAGES, RESPONSES)),
    *((path, b"[]", 400) for path in (CHAT, MESSAGES)),
]


def test_mistakes_are_reported_in_the_protocols_form(alone):
    for path, body, status in MISTAKES:
        body = body if isinstance(body, bytes) else {"model": "base", **body}
        found, _, answer = alone.send("POST", path, body)
        assert found == status, (path, body, answer)
        if path.startswith("/api/"):
            assert [*answer] == ["error"] and answer["error"]
        elif path == MESSAGES:
            kind = "not_found_error" if status == 404 else "invalid_request_error"
            assert answer["type"] == "error" and answer["error"]["type"] == kind
        else:
            assert set(answer["error"]) == {"message", "type", "param", "code"}
    refused = alone.send("POST", MESSAGES, {}, Origin="https://evil.example")
    assert refused[0] == 403 and refused[2]["error"]["type"] == "permission_error"
    assert "--allow_origin https://evil.example" in refused[2]["error"]["message"]
    assert [*alone.send("GET", "/api/absent")[2]] == ["error"]


@pytest.mark.parametrize("client", BODIES)
def test_no_value_of_a_field_is_an_error_of_the_server(client):
    """Whatever stands in a field, at the top or within, a translation refuses it, or makes a chat of it."""
    path, body, _ = BODIES[client]
    translate = {MESSAGES: anthropic.chat_of, RESPONSES: openai_responses.chat_of, CHAT: ollama.chat_of}.get(path)
    taken = 0
    for broken in (each for each in variants(body) if isinstance(each, dict)):
        try:
            kind, fields = (ChatBody, translate(broken)) if translate else ollama.text_of(broken)
            kind.of(fields)
            taken += 1
        except (RequestError, RequestValidationError):
            continue
    assert taken


def variants(value):
    """Copies of a body in which one value is another, at any depth."""
    yield from (json.loads(text) for text in HOSTILE if len(text) < 4000)
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        for other in variants(part):
            copy = value.copy()
            copy[key] = other
            if isinstance(copy, dict) or value is not TURNS:
                yield copy


def test_ollamas_port_is_taken_if_it_is_free(monkeypatch, capsys):
    import socket
    from argparse import Namespace

    from rwkv_peft.inference.serve import app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(app, "OLLAMA_PORT", free.getsockname()[1])
    args = Namespace(ollama=True, host="127.0.0.1", port=0)
    with app.listening(args) as first:
        assert first.getsockname()[1] == app.OLLAMA_PORT
        first.listen()
        with app.listening(args) as second:
            assert second.getsockname()[1] != app.OLLAMA_PORT
    assert f"port {app.OLLAMA_PORT} is taken" in capsys.readouterr().err
