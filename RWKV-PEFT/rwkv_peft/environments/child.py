"""The processes of environments: one that loads their classes, and a fork of it for each conversation, so that a tool
that hangs or dies takes no other conversation with it. Windows has no forks: each conversation's process begins anew.

    rwkv_peft.environments.child FD NAME=SPEC…      FD is its end of a pipe, SPEC FILE.py:CLASS or module:CLASS

The first message says what the process is for. After the name of an environment it serves conversations itself. After
None it replies ("done", {name: [tools, parameters of reset, True if it scores]}) or ("failed", message). Each request
is then the name of an environment and the end of another pipe, which a fork serves, one conversation after the other:

    ("reset", row)                 ("done", a text to append to the prompt, or "")
    ("call", (tool, arguments))    ("done", the result as text)
    ("score", None)                ("done", a number or None)
    ("state", None)                ("done", its attributes as JSON)

or ("failed", message), after ("process", its number). There each reply is a line of JSON, because the processes that a
tool starts have that end too: the parent waits for no rest of a message beyond a request's time.
"""

import asyncio
import importlib
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any

from ..checkpoints.readable import require_readable
from ..children import when_parent_ends
from ..cli.errors import UserError, summarize
from ..system import End, taken_over, write_whole
from .tool_schemas import RESET, SCORE, methods_of, tool_schema
from .user_code import end_all, load, number_in, raised

LONGEST = 20_000  # characters of a result: a model that reads more learns nothing from it


def open_class(spec: str) -> type:
    """The class that FILE.py:CLASS or module:CLASS names. Raises UserError if there is none."""
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise UserError("an environment is FILE.py:CLASS or module:CLASS")
    if place.endswith(".py"):
        require_readable(place, "no such file; name a Python file, as FILE.py:CLASS")
        module = load(place)
    else:
        try:
            module = importlib.import_module(place)
        except Exception as error:
            raise UserError(f"the module cannot be imported: {summarize(error, named=True)}; install it") from error
    environment = getattr(module, name, None)
    if not inspect.isclass(environment):
        raise UserError(f"{Path(place).name} has no class {name}; name one that it has")
    return environment


def description(environment: type) -> tuple[list[dict[str, Any]], list[str], bool]:
    """(its tools, the fields that reset requires, True if it scores conversations)."""
    tools = [tool_schema(name, method) for name, method in methods_of(environment).items()]
    parameters = [*inspect.signature(getattr(environment, RESET)).parameters.values()][1:]
    required = [one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    return tools, required, callable(getattr(environment, SCORE, None))


class Conversations:
    """Serves conversations, one after the other, with one instance of an environment, which is made once."""

    def __init__(self, environment: type, file: str) -> None:
        self.environment, self.file = environment, file
        self.instance: Any = None

    def reset(self, row: dict[str, Any]) -> str:
        """Begin a conversation of a row -> the text that its prompt ends with, besides the row's."""
        if self.instance is None:
            self.instance = self.acted(self.environment)
        taken = inspect.signature(self.instance.reset).parameters.values()
        fields = (
            row
            if any(one.kind is one.VAR_KEYWORD for one in taken)
            else {one.name: row[one.name] for one in taken if one.name in row}
        )
        found = self.acted(self.instance.reset, **fields)
        if not isinstance(found, str | None):
            raise UserError(f"reset returned {type(found).__name__}; return a text for the prompt, or None")
        return found or ""

    def call(self, work: tuple[str, dict[str, Any]]) -> str:
        """The result of a tool, or its error, as text. The model may call a tool that is not there, or wrongly."""
        name, arguments = work
        tools = methods_of(self.environment)
        if name not in tools:
            return f"error: there is no tool {name}; there is {', '.join(tools)}"
        try:
            found = self.acted(getattr(self.instance, name), **arguments)
        except UserError as error:
            return f"error: {str(error).removeprefix('it raised ')}"[:LONGEST]
        text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"

    def score(self, work: None) -> float | None:
        """The conversation's score by get_reward."""
        return number_in(self.acted(self.instance.get_reward))

    def state(self, work: None) -> str:
        """The instance's attributes that JSON holds, as its text, for rewards to read."""
        found = {}
        for name, value in vars(self.instance).items():
            with suppress(TypeError, ValueError, RecursionError):
                found[name] = json.loads(json.dumps(value))
        return json.dumps(found)

    def acted(self, act: Callable[..., Any], **arguments: Any) -> Any:
        """act(**arguments), awaited if it is a coroutine. Raises UserError for whatever it raises."""
        try:
            found = act(**arguments)
            return asyncio.run(found) if inspect.iscoroutine(found) else found
        except (Exception, SystemExit) as error:
            raise UserError(f"it raised {raised(error, self.file)}") from error

    def serve(self, pipe: "End[Any, Any]") -> None:
        """Answer requests until the other end of the pipe is closed."""
        process = os.getpid()
        with suppress(EOFError, BrokenPipeError, ConnectionResetError):
            write_whole(pipe, json.dumps(("process", process)).encode() + b"\n")
            while True:
                kind, work = pipe.recv()
                try:
                    reply = "done", getattr(self, kind)(work)
                except UserError as error:
                    reply = "failed", str(error)
                if os.getpid() != process:  # a tool has forked, and its child came back from it, too
                    os._exit(0)
                write_whole(pipe, json.dumps(reply).encode() + b"\n")


def main(argv: list[str]) -> None:
    """Do what the first message says, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    pipe, specs = taken_over(int(argv[0])), dict(each.split("=", 1) for each in argv[1:])
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        if (name := pipe.recv()) is None:
            describe_and_fork(pipe, specs)
        else:
            when_parent_ends(end_all)
            serve(name, open_class(specs[name]), specs, pipe)


def describe_and_fork(pipe: "End[Any, Any]", specs: dict[str, str]) -> None:
    """Load the classes of {name: SPEC}, and fork for conversations where that can be done."""
    environments, reply = dict[str, type](), dict[str, Any]()
    for name, spec in specs.items():
        try:
            environments[name] = open_class(spec)
            reply[name] = description(environments[name])
        except UserError as error:
            pipe.send(("failed", f"{spec}: {error}"))
            return
    pipe.send(("done", reply))
    if sys.platform == "win32":
        return
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks that end leave nothing
    while 0 not in wait([pipe, 0]):  # standard input ends with the parent
        name = pipe.recv()
        handle = recv_handle(pipe)
        if os.fork():
            os.close(handle)
            continue
        os.setpgid(0, 0)  # to be ended with the processes that a tool starts
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        pipe.close()
        when_parent_ends(end_all)
        serve(name, environments[name], specs, taken_over(handle))


def serve(name: str, environment: type, specs: dict[str, str], pipe: "End[Any, Any]") -> None:
    """Serve conversations of an environment until the other end is closed, and end with all that its tools started."""
    Conversations(environment, specs[name].rpartition(":")[0]).serve(pipe)
    end_all()


if __name__ == "__main__":
    main(sys.argv[1:])
