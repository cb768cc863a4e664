"""Clients that are slow or gone: they are given up, and their places are free."""

import asyncio
import re
import threading
import time
from types import SimpleNamespace

import pytest
from serving import HEAD, Server, ended

from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.generate.continuation import Continuation
from rwkv_peft.serve.guard import Gate, Guard


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


def test_a_client_that_does_not_read_gives_its_place_back():
    app = pytest.importorskip("rwkv_peft.serve.app")
    gone, requests = threading.Event(), [{"type": "http.request", "body": b""}]

    async def endless():
        while True:
            yield "data: x\n\n"

    async def receive():
        return requests.pop() if requests else await asyncio.sleep(3600)

    async def stuck(message):
        await asyncio.sleep(3600)

    conversation = SimpleNamespace(stream=endless, exchange=SimpleNamespace(gone=gone))
    guard = Guard(app.Events(conversation), Gate((), (), None, 10, 0.05), lambda status: None)
    scope = {"type": "http", "asgi": {}, "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    asyncio.run(asyncio.wait_for(guard(scope, receive, stuck), 60))
    assert gone.is_set()


def test_an_answer_that_takes_too_long_ends():
    worker = pytest.importorskip("rwkv_peft.serve.worker")

    async def ask():
        exchange = worker.Exchange(1, 0.0, lambda: None)
        choice = worker.Choice(exchange, 0, Continuation({}, BytesTokenizer(), ()), re.compile(""), None)
        assert choice.draw(66, None) == choice.over() == worker.LATE
        choice.finish(worker.LATE)
        return [piece async for piece in exchange.heard()]

    assert [(piece.text, piece.end) for piece in asyncio.run(ask())] == [("A", ""), ("", "late")]
