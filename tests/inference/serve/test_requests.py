"""Bodies that ask for too much are refused before they cost anything."""

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.inference.serve.requests import LONG, ChatBody, CompletionBody, Limits, prompts_within
from rwkv_peft.inference.serve.schema import LARGEST, SchemaCompiler
from rwkv_peft.inference.serve.service import LONG_BODY, Service
from rwkv_peft.inference.serve.web import RequestError

ASK = {"model": "base", "prompt": "x", "max_tokens": 2}
LIMITS = Limits(completions=4, prompt=10, tokens=10, vocabulary=257)
CHAT = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
# what nobody expects in a field, as JSON
HOSTILE = (
    *map(json.dumps, (5, True, [], {}, [[]], "", "x\0y", "x" * 70_000, ["x"], {"a": 1}, 10**400, -1, 1e308)),
    *("NaN", "[NaN]", "-Infinity", '"\\ud800"', '{"\\ud800": 1}', "1" * 5000, "[" * 500 + "]" * 500),
    *('{"type": "json_schema", "json_schema": 5}', '{"type": "json_object", "schema": 5}', '{"type": {}}'),
    *('{"type": "function", "function": {"name": 5}}', '[{"name": 5}]', '[{"role": "user", "content": 5}]'),
    '[{"name": "f", "parameters": ' + '{"not": ' * 300 + "{}" + "}" * 301 + "]",
    '[{"role": "assistant", "tool_calls": [{"name": "' + "x" * 70_000 + '", "arguments": 5}]}]',
)


class Tokenizer:
    """Any text is a token."""

    def encode(self, text):
        assert len(text) < 10
        return [0]


@pytest.mark.parametrize(
    "body",
    [
        CompletionBody(model="m", prompt=[""] * 5),
        ChatBody(model="m", messages=[{}] * 11),
        ChatBody(model="m", messages=[{}], tools=[{}] * 10),
        CompletionBody(model="m", prompt=["x", "x" * (10 * LONG + 1)]),
        ChatBody(model="m", messages=[{"role": "user", "content": "x" * 10 * LONG}]),
    ],
)
def test_too_much_is_refused_before_it_is_tokenized(body):
    with pytest.raises(RequestError, match="may be"):
        prompts_within(body, Tokenizer(), LIMITS)


def test_a_text_without_a_request_has_the_same_limit():
    service = SimpleNamespace(limits=LIMITS, catalog=SimpleNamespace(tokenizer=Tokenizer()))
    assert Service.encoded(service, "x") == [0]
    with pytest.raises(RequestError, match="10 tokens may be"):
        Service.encoded(service, "x" * (10 * LONG + 1))


def test_long_texts_are_tokenized_one_at_a_time_and_short_ones_meanwhile():
    """The first long one waits for a short one, and the second long one for the first."""
    short, order = threading.Event(), []

    def first():
        assert short.wait(300)
        order.append("first")

    async def all_at_once():
        service = SimpleNamespace(reading=asyncio.Lock())
        acts = ((LONG_BODY + 1, first), (LONG_BODY + 1, lambda: order.append("second")), (1, short.set))
        await asyncio.gather(*(Service.read(service, size, act) for size, act in acts))

    asyncio.run(all_at_once())
    assert order == ["first", "second"]


@pytest.mark.parametrize(
    "mistakes", [{f"x{n}": 0 for n in range(999)}, {"prompt": [None] * 999}, {"prompt": [[None] * 999] * 999}]
)
def test_a_thousand_mistakes_are_told_as_few(mistakes):
    with pytest.raises(ValidationError) as refusal:
        CompletionBody(**{"model": "m", "prompt": "x"} | mistakes)
    assert refusal.value.error_count() < 6


@pytest.mark.parametrize("path, sound", [("/v1/completions", ASK), ("/v1/chat/completions", CHAT)])
def test_no_field_is_an_error_of_the_server(server, path, sound):
    form = CompletionBody if sound is ASK else ChatBody
    for field in form.model_fields:
        for value in HOSTILE:
            given = {name: json.dumps(known) for name, known in sound.items()} | {field: value}
            body = ", ".join(f'"{name}": {text}' for name, text in given.items())
            status, _, answer = server.send("POST", path, f"{{{body}}}".encode())
            assert status in (200, 400, 404, 413), (field, value[:99])
            assert status == 200 or "stream" in field or len(answer["error"]["message"]) < 3000


@pytest.mark.parametrize("start", [b'{"a": [', b'{"\\"": [', b'{"\\\\": ['])
def test_a_body_that_is_slow_to_read_is_not_read(server, start):
    def asked(body):
        return server.send("POST", "/v1/completions", body)[0]

    assert asked(start + b"[]," * 20_000 + b"[]]}") == 413
    assert asked(json.dumps(ASK).encode("utf-16")) == 413
    assert asked(ASK | {"user": "[{:" * 20_000}) == 200


def test_clients_load_no_more_than_they_may(server):
    calm = {"kind": "state", "file": "calm.pth"}
    loaded = [server.send("POST", "/v1/adapters", calm | {"name": f"calm{number}"}) for number in range(3)]
    assert [status for status, *_ in loaded] == [200, 200, 409] and "--max_loaded" in loaded[2][2]["error"]["message"]
    assert [server.send("DELETE", f"/v1/adapters/calm{number}")[0] for number in range(3)] == [200, 200, 404]


def test_a_schema_is_compiled_up_to_a_size():
    form = {"type": "json_object", "schema": {"enum": ["x"] * (LARGEST // 4)}}
    body = ChatBody(model="m", messages=[{}], response_format=form)
    with pytest.raises(RequestError, match="larger than 524,288 characters") as refused:
        SchemaCompiler(BytesTokenizer(), 257).compiled(body)
    assert (refused.value.status, refused.value.param) == (413, "response_format")
