"""Clients that are slow or gone: they are given up, and their places are free."""

import asyncio
import contextlib
import threading
import time
from types import SimpleNamespace

import pytest
from serving import HEAD, Server, ended

from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.inference.serve.web import Gate, Guard
from rwkv_peft.inference.text import Continuation

SCOPE = {"type": "http", "asgi": {}, "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}


@pytest.fixture(scope="module")
def impatient(files):
    """A server of its own, because any client may be slow on a busy machine."""
    running = Server("--model", files / "base.pth", "--client_seconds", 1)
    yield running
    running.stop()


@pytest.mark.parametrize("begun", [b"", b"POST /v1/comp", HEAD + b"Content-Length: 50\r\n\r\n{"])
def test_a_client_that_stops_in_the_midst_of_a_request_is_given_up(impatient, begun):
    with impatient.raw(begun) as connection:
        assert ended(connection)[:12] in (b"", b"HTTP/1.1 408")


def test_a_client_that_sends_a_byte_now_and_then_is_given_up(impatient):
    with impatient.raw(b"POST / HTTP/1.1\r\nX: ") as connection:
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() < began + 300:
                connection.sendall(b"x")
                time.sleep(0.2)


@pytest.mark.parametrize("begun", [b"", b"POST /v1/comp", HEAD + b"Content-Length: 50\r\n\r\n{"])
def test_clients_that_are_slow_lock_nobody_out(server, begun):
    with contextlib.ExitStack() as stack:
        for _ in range(600):
            stack.enter_context(server.raw(begun))
        assert server.send("GET", "/v1/models")[0] == 200
    assert "Traceback" not in server.process.outputs[1].read_text()


def test_an_answer_that_the_servers_end_cuts_is_a_refusal():
    sent = []

    begun = asyncio.Event()

    async def endless(scope, receive, send):
        begun.set()
        await asyncio.sleep(3600)

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    async def cut():
        task = asyncio.ensure_future(Guard(endless, Gate((), (), None, 10, 9.0))(SCOPE, receive, send))
        await begun.wait()
        task.cancel()
        await task

    asyncio.run(cut())
    assert sent[0]["status"] == 503 and b"server_error" in sent[1]["body"]


def test_a_client_that_does_not_read_gives_its_place_back():
    app = pytest.importorskip("rwkv_peft.inference.serve.app")
    gone, requests = threading.Event(), [{"type": "http.request", "body": b""}]

    async def endless():
        while True:
            yield "data: x\n\n"

    async def receive():
        return requests.pop() if requests else await asyncio.sleep(3600)

    async def stuck(message):
        await asyncio.sleep(3600)

    conversation = SimpleNamespace(stream=endless, gone=gone, response=SimpleNamespace(media="text/plain"))
    guard = Guard(app.Events(conversation), Gate((), (), None, 10, 0.05))
    asyncio.run(asyncio.wait_for(guard(SCOPE, receive, stuck), 60))
    assert gone.is_set()


def test_an_answer_that_takes_too_long_ends():
    module = pytest.importorskip("rwkv_peft.inference.serve.conversation")
    response = pytest.importorskip("rwkv_peft.inference.serve.responses").CompletionResponse

    async def ask():
        conversation = module.Conversation(
            response("model", BytesTokenizer(), False), 1, 0.0, lambda seconds: None, lambda: None
        )
        stream = module.CompletionStream(conversation, 0, Continuation({}, BytesTokenizer(), ()))
        assert stream.on_token(66, None) == stream.cancelled() == module.LATE
        stream.on_end(module.LATE)
        return [part async for part in conversation.parts()]

    assert [(part.text, part.end) for part in asyncio.run(ask())] == [("A", ""), ("", "late")]
