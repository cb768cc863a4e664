"""The server refuses strangers' pages and names, files elsewhere, and bodies that take too much."""

import asyncio
import json
import shlex
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from serving import HEAD, Server, ended

from families import DISTINCT, shaken
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.inference.serve.flags import named, parse_flags
from rwkv_peft.inference.serve.requests import LONG, ChatBody, CompletionBody, Limits, prompts_within
from rwkv_peft.inference.serve.schema import LARGEST, SchemaCompiler
from rwkv_peft.inference.serve.service import LONG_BODY, Service
from rwkv_peft.inference.serve.states import StateFolder
from rwkv_peft.inference.serve.web import RequestError

HOURS = {"type": "integer", "multipleOf": 99999989}  # of compiling
ASK = {"model": "base", "prompt": "x", "max_tokens": 2}
BEGUN = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


def error_of(answer):
    status, _, body = answer
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return status


def ask(server, **headers):
    return server.send("POST", "/v1/completions", ASK, **headers)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://[", "http://localhost.evil"]
)
def test_pages_of_other_sites_are_refused(server, origin):
    assert error_of(ask(server, Origin=origin)) in (400, 403)
    assert error_of(server.send("DELETE", "/v1/adapters/poet", Origin=origin)) in (400, 403)
    assert error_of(server.send("GET", "/v1/models", Sec_Fetch_Site="cross-site")) == 403


@pytest.mark.parametrize(
    "origin", ["null", "file://", "tauri://localhost", "app://obsidian.md", "chrome-extension://abc", "http://a.b'c"]
)
def test_a_refused_origin_is_named_with_the_flag_that_allows_it(server, origin):
    status, _, body = ask(server, Origin=origin)
    line = body["error"]["message"].partition("`serve ")[2].partition("`")[0]
    assert status == 403 and parse_flags(["--model", "m.pth", *shlex.split(line)])[0].allow_origin == [origin]


def test_own_pages_and_allowed_ones_are_answered(server):
    assert ask(server, Origin=server.url)[0] == 200
    status, headers, _ = ask(server, Origin="https://chat.example.org")
    assert status == 200 and headers["Access-Control-Allow-Origin"] == "https://chat.example.org"
    asked = {"Origin": "https://chat.example.org", "Access-Control-Request-Method": "POST"}
    assert server.send("OPTIONS", "/v1/completions", **asked)[0] == 200
    assert server.send("OPTIONS", "/v1/completions", **asked | {"Origin": "https://evil.example"})[0] == 403


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost@evil", "localhost/evil", "localhost?e"]
    + ["", "[", "[::1].evil.example", "[::1]evil", "localhost:8000:evil", "localhost:evil"],
)
def test_a_name_that_is_not_the_servers_is_refused(server, host):
    assert error_of(ask(server, Host=host)) in (400, 421)


def test_own_names_and_digits_are_taken_and_forms_of_pages_are_not(server):
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:80", "192.168.1.7"):
        assert ask(server, Host=host)[0] == 200
    assert error_of(ask(server, Content_Type="text/plain")) == 415


@pytest.mark.parametrize(
    "file",
    ["../poet.safetensors", "/etc/passwd", "link.safetensors", "a/../../poet.safetensors", "absent", "x\0y", "", "~/x"]
    + ["\ud800", "broken.safetensors"],
)
def test_files_elsewhere_are_not_loaded(server, files, file):
    for name in (file, file.replace("../", f"{files}/")):
        answer = server.send("POST", "/v1/adapters", {"name": "new", "file": name})
        assert error_of(answer) in (400, 404) and str(files) not in answer[2]["error"]["message"].replace(name, "")
    assert len(server.send("GET", "/v1/models")[2]["data"]) == 4


def test_a_run_without_an_adapter_is_told_without_its_place(server):
    answer = server.send("POST", "/v1/adapters", {"name": "new", "file": "begun"})
    assert error_of(answer) == 400 and "the run in ./begun has saved nothing yet" in answer[2]["error"]["message"]


@pytest.mark.parametrize("name", ["", "../x", "a b", "a\nb", "é", "x" * 65, "base", "\x1b[31m"])
def test_hostile_names_are_refused(server, name):
    assert error_of(server.send("POST", "/v1/adapters", {"name": name, "file": "poet.safetensors"})) in (400, 409)
    if name not in ("", "base"):
        answer = server.send("POST", "/v1/completions", ASK | {"model": name})
        assert error_of(answer) == 404 and "\x1b" not in answer[2]["error"]["message"]


@pytest.mark.parametrize(
    "body, field",
    [
        (b"{", ""),
        (b"\xff", ""),
        (b"[" * 10_000, ""),
        (b"[]", ""),
        ({}, "prompt"),
        (ASK | {"tempreature": 1}, "tempreature"),
        (ASK | {"temperature": -1}, "temperature"),
        (ASK | {"top_p": float("nan")}, "top_p"),
        (ASK | {"max_tokens": -2}, "max_tokens"),
        (ASK | {"min_p": 2}, "min_p"),
        (ASK | {"repetition_penalty": 0}, "repetition_penalty"),
        (ASK | {"logit_bias": {"300": 1}}, "logit_bias"),
        (ASK | {"logit_bias": {"3": 101}}, "logit_bias"),
        (ASK | {"stop": "a", "stopping_strings": "b"}, "stopping_strings"),
        (ASK | {"n": 5}, None),
        (ASK | {"stop": [""]}, "stop"),
        (ASK | {"echo": True, "logprobs": 1}, ""),
        (ASK | {"prompt": [300]}, "prompt"),
        (ASK | {"prompt": "\ud800"}, "prompt"),
        (ASK | {"prompt": "x" * 70_000}, None),
        (ASK | {"\ud800": 1}, ""),
    ],
)
def test_a_mistaken_body_is_told_by_its_field(server, body, field):
    answer = server.send("POST", "/v1/completions", body)
    assert error_of(answer) == 400
    assert not field or answer[2]["error"]["param"].startswith(field)


@pytest.mark.parametrize(
    "more, field",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "messages"),
        ({"tools": [{"name": "f"}], "tool_choice": "perhaps"}, "tool_choice"),
        ({"tools": [{"name": "f"}], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"name": "f"}], "tool_choice": "required", "think": "on"}, "tool_choice"),
        ({"messages": BEGUN, "think": "on"}, "think"),
        ({"think": "loud"}, "think"),
        ({"reasoning_effort": "some"}, "reasoning_effort"),
        ({"reasoning_format": "deepseek-legacy"}, "reasoning_format"),
        ({"chat_template_kwargs": {"tone": "low"}}, "chat_template_kwargs.tone"),
        ({"messages": BEGUN, "response_format": {"type": "json_object"}}, "messages"),
        ({"state": "poet"}, "state"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": 5}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": 5}}, "response_format"),
        ({"response_format": {"schema": {}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "reasoning_effort": "low"}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": HOURS}}, "response_format"),
    ],
)
def test_a_mistaken_chat_is_told_by_its_field(server, more, field):
    answer = server.send(
        "POST", "/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "x"}]} | more
    )
    assert error_of(answer) == 400 and answer[2]["error"]["param"] == field


@pytest.mark.parametrize(
    "body, message",
    [
        ({"stop": ""}, "stop '': String"),
        ({"adapters": {"poet": 1e9}}, "adapters.poet 1000000000.0: Input"),
        ({"max_tokens": "5"}, "max_tokens '5': Input"),
        ({"best_of": 2}, "best_of 2: it is not supported; leave it out"),
        ({"prompt": None}, "prompt: Field required"),
        ({"echo": True, "logprobs": 1}, "body: echo repeats the prompt's text"),
        (b"{", "body: JSON decode error"),
    ],
)
def test_a_mistake_is_reported_with_its_value(server, body, message):
    answer = server.send("POST", "/v1/completions", body if isinstance(body, bytes) else ASK | body)
    assert error_of(answer) == 400 and answer[2]["error"]["message"].startswith(message)


def test_unknown_routes_are_refused_in_the_same_form(server):
    assert error_of(server.send("GET", "/v1/nothing")) == 404 and error_of(server.send("GET", "/v1/completions")) == 405
    absent = server.send("GET", "/docs")
    assert error_of(absent) == 404 and "there are /api/chat, /api/generate" in str(absent[2])


def test_a_body_that_is_too_large_is_refused_and_one_of_100_megabytes_not_read(server):
    assert error_of(server.send("POST", "/v1/completions", ASK | {"prompt": "x" * (3 << 20)})) == 413
    with server.raw(HEAD + b"Content-Length: 104857600\r\n\r\n" + b"x" * 1000) as connection:
        assert b"413" in ended(connection).split(b"\r\n")[0]
    with server.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as connection:
        sent = 0
        try:
            while sent < 100:  # megabytes
                connection.sendall(b"100000\r\n" + b"x" * (1 << 20) + b"\r\n")
                sent += 1
        except OSError:
            pass
    assert sent < 100
    assert ask(server)[0] == 200


def test_a_key_is_asked_for_and_sigterm_drains(files):
    key = "k" * 32
    server = Server("--model", files / "base.pth", "--api_key", "env:SERVE_KEY", SERVE_KEY=key)
    try:
        assert server.send("GET", "/health")[0] == 200
        for header in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Bearer \xe9"}):
            assert error_of(server.send("GET", "/v1/models", **header)) == 401
            assert error_of(server.send("POST", "/v1/completions", ASK, **header)) == 401
            assert error_of(server.send("GET", "/metrics", **header)) == 401
        right = {"Authorization": f"Bearer {key}"}
        assert server.send("GET", "/metrics", **right)[0] == 200
        long = {"max_tokens": 400, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        body = json.dumps(ASK | long).encode()
        head = HEAD + f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with server.raw(head + body) as connection:
            assert connection.recv(9) == b"HTTP/1.1 "  # it has begun
            server.process.send_signal(signal.SIGTERM)
            assert b'"completion_tokens":400' in ended(connection).replace(b" ", b"")
        out, err = server.process.communicate(timeout=60)
        assert server.process.returncode == 0 and err.endswith("stopped\n") and key not in out + err
    finally:
        server.stop()


def test_a_gpu_that_fails_ends_the_server_with_a_message(files):
    server = Server("--model", files / "base.pth", program=[Path(__file__).with_name("lost_gpu.py")])
    try:
        assert error_of(server.send("POST", "/v1/completions", ASK)) == 500
        _, err = server.process.communicate(timeout=60)
        assert server.process.returncode == 1
        assert err.endswith("more (CUDA error: an illegal memory access was encountered); start the server again\n")
    finally:
        server.stop()


def refused(*flags):
    with pytest.raises(UserError) as error:
        parse_flags(["--model", "m.pth", *map(str, flags)])
    return str(error.value)


def test_other_addresses_take_a_key_that_is_not_on_the_command_line(tmp_path, monkeypatch):
    assert "an address that others reach (0.0.0.0) needs --api_key" in refused("--host", "0.0.0.0")
    assert "not the key itself" in refused("--api_key", "sk-secret")
    assert "sk-secret" not in refused("--api_key", "sk-secret")
    (tmp_path / "key").write_text("short\n")
    assert "at least 16" in refused("--api_key", tmp_path / "key")
    assert "the variable holds no key" in refused("--api_key", "env:ABSENT")
    (tmp_path / "key").write_text("0123456789abcdef\n")
    args, _ = parse_flags(["--model", "m.pth", "--host", "0.0.0.0", "--api_key", str(tmp_path / "key")])
    assert args.key == "0123456789abcdef"


def test_names_are_told_apart_before_anything_is_loaded():
    assert named("out/poet.safetensors") == ("poet", "out/poet.safetensors")
    assert "is not NAME=FILE" in refused("--adapter", "my poet.safetensors")
    assert "poet names two models" in refused("--adapter", "poet=a", "--state", "poet=b")
    assert "m names two models" in refused("--adapter", "m=a")
    assert "no such folder" in refused("--files", "absent")
    assert parse_flags(["--model", "dir/My model.pth"])[0].name == "My-model"


@pytest.mark.parametrize("flag", ["adapter", "state", "allow_host", "allow_origin"])
def test_repeated_flags_add_up(flag):
    args, _ = parse_flags(["--model", "m.pth", f"--{flag}", "a", "b", f"--{flag}", "c"])
    assert [getattr(one, "name", one) for one in getattr(args, flag)] == ["a", "b", "c"]


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


@pytest.mark.parametrize("path, sound", [("/v1/completions", ASK), ("/v1/chat/completions", CHAT)])
def test_no_field_is_an_error_of_the_server(server, path, sound):
    form = CompletionBody if sound is ASK else ChatBody
    for field in form.model_fields:
        for value in HOSTILE:
            if field.startswith("max_") and value in ("-1", json.dumps(10**400)):
                continue  # of a million tokens here
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


def test_a_schema_is_compiled_up_to_a_size():
    form = {"type": "json_object", "schema": {"enum": ["x"] * (LARGEST // 4)}}
    body = ChatBody(model="m", messages=[{}], response_format=form)
    with pytest.raises(RequestError, match="larger than 524,288 characters") as refused:
        SchemaCompiler(BytesTokenizer(), 257).compiled(body)
    assert (refused.value.status, refused.value.param) == (413, "response_format")


def test_a_state_that_cannot_be_saved_names_no_path_of_the_server(tmp_path, monkeypatch):
    def fails(path, *more):
        raise UserError(f"{path}: {path.parent} has no room")

    monkeypatch.setattr("rwkv_peft.inference.serve.states.save_state_file", fails)
    states = StateFolder(None, SimpleNamespace(model=shaken(DISTINCT[0])), None, 1)
    states.folder = str(tmp_path)
    with pytest.raises(RequestError, match="mine: --states has no room"):
        states.save("mine", None)
