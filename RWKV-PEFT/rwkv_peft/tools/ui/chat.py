"""Servers of models that the page opens for a chat, and the way to them.

Each is `rwkv-peft serve` on a port of its own: a model that fails or is closed takes nothing else with it, and gives
its memory back.
"""

import http.client
import re
from collections.abc import Iterator
from contextlib import closing, suppress

from ...cli.errors import UserError
from .job import OUTPUT
from .jobs import KEY, RUNNING, Jobs
from .lines import read

HOST = "127.0.0.1"
LISTENS = re.compile(rb": http://127\.0\.0\.1:(\d+)/v1$", re.MULTILINE)  # a server's word
WAITED = 600  # seconds for an answer's next word


def serve(jobs: Jobs, model: str, adapter: str = "", other: str = "", state: str = "", **flags: str) -> str:
    """Start a server of a model, and of two adapters and a state as models beside it, with further flags that are not
    empty; -> its job."""
    words = ["serve", "--model", model, "--name", "base", "--port", "0", "--api_key", f"env:{KEY}"]
    words += ["--drain_seconds", "1"]  # who closes it waits for no answer
    adapters = [f"{name}={file}" for name, file in (("adapter", adapter), ("other", other)) if file]
    words += ["--adapter", *adapters] * bool(adapters) + ["--state", f"state={state}"] * bool(state)
    return jobs.start([*words, *(word for name, value in flags.items() if value for word in (f"--{name}", value))])


def close_chats(jobs: Jobs) -> None:
    """End the servers that this page has opened, because nobody else knows of them."""
    for name in [*jobs.own]:
        with suppress(UserError, OSError):  # it has ended
            if jobs.job(name)["words"][0] == "serve":
                jobs.stop(name)


def port_of(jobs: Jobs, name: str) -> int:
    """The port of a running server. Raises UserError if the job is none, is of another page, whose key is another, or
    does not listen yet."""
    job = jobs.job(name)
    if name not in jobs.own or job["words"][0] != "serve" or job["state"] != RUNNING:
        raise UserError(f"job {name} serves no model now; open it again")
    if not (listens := LISTENS.search(read(jobs.folder_of(name) / OUTPUT))):
        raise UserError("the model is not loaded yet")
    return int(listens[1])


def ask(jobs: Jobs, name: str, path: str, body: bytes | None = None) -> tuple[int, str, Iterator[bytes]]:
    """Ask the server of a job -> status, content type, and the answer piece by piece as it comes. Raises UserError if
    it does not listen yet, or no more."""
    connection = http.client.HTTPConnection(HOST, port_of(jobs, name), timeout=WAITED)
    headers = {"Authorization": f"Bearer {jobs.key}", "Content-Type": "application/json"}
    try:
        method = "GET" if body is None else "POST"
        connection.request(method, f"/{path}", body, headers)
        response = connection.getresponse()
    except OSError as error:
        connection.close()
        raise UserError("the model is not loaded yet, or its server is gone") from error

    def pieces() -> Iterator[bytes]:
        with closing(connection), suppress(OSError, http.client.HTTPException):  # the server is gone: so the page says
            while piece := response.read1(1 << 16):
                yield piece

    return response.status, response.getheader("Content-Type", "application/json"), pieces()
