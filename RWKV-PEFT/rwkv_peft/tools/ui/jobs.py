"""The commands that the page starts: each has a folder for its output and exit code, and a process that outlives the
page's server and records how the command ended:

    python -m rwkv_peft.tools.ui.jobs FOLDER COMMAND argument…

Among them are servers of models for chats, `rwkv-peft serve` on ports of their own. A model that fails or is closed
ends nothing else, and frees its memory.
"""

import http.client
import json
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ...checkpoints.atomic import write_text
from ...checkpoints.lock import hold, holder
from ...checkpoints.readable import within
from ...children import python_command
from ...cli.errors import UserError, visible
from ...cli.names import is_whole
from .files import hidden, is_plain, objects, read

OUTPUT, EXIT, LOCK, COMMAND = "output.txt", "exit", ".lock", "command.json"
HELD = 50  # jobs that are remembered
NUMBER = re.compile("[0-9]{1,15}")
LATEST = 1e18  # seconds since 1970: when a job began, and a float holds it
KEY = "RWKV_PEFT_CHAT_KEY"  # the variable with the key of served models, which no other user of this machine can read
COMMANDS = tuple("download demo preprocess train learn plan merge check inspect convert push eval serve doctor".split())
TAIL = 200_000  # bytes of output that are shown at a time
STARTING = 20.0  # seconds in which a job of another page takes its lock
POLLED = 0.05  # seconds between looks for it
RUNNING, ENDED, LOST = "running", "ended", "lost"
STOPPED = (130, 143)  # exit codes of a command that Ctrl-C or SIGTERM ended in order


class Jobs:
    """Starts commands in the folder `root`, and finds those that it started, also before this process began."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / ".rwkv-peft" / "jobs"
        self.own: dict[str, subprocess.Popen[bytes]] = {}  # those that this process began
        self.key = secrets.token_hex(32)  # of the models that they serve

    def start(self, words: Sequence[str]) -> str:
        """Start a command of this package; -> its number. Raises UserError for one that the page does not start."""
        if not words or words[0] not in COMMANDS:
            raise UserError(f"the page starts {', '.join(COMMANDS)}, and not {' '.join(words[:1]) or 'nothing'}")
        folder = self.new_folder()
        (folder / COMMAND).write_text(json.dumps({"words": list(words), "began": time.time()}))
        with open(folder / OUTPUT, "ab") as output:
            self.own[folder.name] = process = subprocess.Popen(
                python_command("rwkv_peft.tools.ui.jobs", folder, *words),
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {KEY: self.key},
                start_new_session=True,  # Ctrl-C in the server's terminal is not for it
            )
        threading.Thread(target=process.wait, daemon=True).start()  # else it stays as a zombie when it has ended
        return folder.name

    def new_folder(self) -> Path:
        """Make the folder of the next job, and forget the oldest that have ended."""
        hidden(self.root, self.folder.name)
        numbers = self.numbers()
        for number in numbers[:-HELD][:HELD]:  # a stranger's folder may hold any number
            if self.state(self.folder / str(number)) != RUNNING:
                shutil.rmtree(self.folder / str(number), ignore_errors=True)
        number = numbers[-1] + 1 if numbers else 1
        while True:
            with suppress(FileExistsError):
                (self.folder / str(number)).mkdir()
                return self.folder / str(number)
            number += 1

    def numbers(self) -> list[int]:
        """The numbers of all jobs, in their order; none of links."""
        if within(self.root, self.folder) != self.folder or not self.folder.is_dir():
            return []
        with os.scandir(self.folder) as found:
            names = [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
        return sorted(int(name) for name in names if NUMBER.fullmatch(name))

    def all(self) -> list[dict[str, Any]]:
        """The newest jobs, the last first, without their output."""
        found = (self.described(self.folder / str(number)) for number in reversed(self.numbers()[-2 * HELD :]))
        return [job for job in found if job is not None]

    def described(self, folder: Path) -> dict[str, Any] | None:
        """A job's number, words, state, exit code, and when it began and ended (0: not yet, or not known); None if its
        folder has no record."""
        match next(objects([read(folder / COMMAND)]), None):
            case {"words": [str(), *_] as words, "began": int(began) | float(began)} if abs(began) <= LATEST:
                state = self.state(folder, began)
            case _:
                return None
        code = read(folder / EXIT, 9) if state == ENDED else b""
        told = {
            "id": folder.name,
            "own": folder.name in self.own,
            "words": [str(word) for word in words],
            "began": began,
            "state": state,
            "ended": (folder / EXIT).stat().st_mtime if state == ENDED else 0.0,
        }
        return told | {"code": int(code) if code.isdigit() else None}

    def state(self, folder: Path, began: float = 0.0) -> str:
        """RUNNING, ENDED if its exit code is known, or LOST if its process is gone without one."""
        if (folder / EXIT).exists():
            return ENDED
        own = self.own.get(folder.name)
        starting = own.poll() is None if own else 0 <= time.time() - began < STARTING
        if starting or holder(folder / LOCK) is not None:
            return RUNNING
        return ENDED if (folder / EXIT).exists() else LOST  # it may have ended meanwhile

    def job(self, name: str) -> dict[str, Any]:
        """A job without its output. Raises UserError if there is none of that number."""
        job = self.described(self.folder_of(name))
        if job is None:
            raise UserError(f"there is no job {name}")
        return job

    def read(self, name: str, begin: int = 0) -> dict[str, Any]:
        """A job with its output from byte `begin` on, and `next`, the byte to go on from."""
        folder, job = self.folder_of(name), self.job(name)
        if not is_plain(folder / OUTPUT):
            return job
        with open(folder / OUTPUT, "rb") as output:
            size = output.seek(0, os.SEEK_END)
            output.seek(max(begin, size - TAIL, 0))
            text = output.read(TAIL)
            job |= {"output": visible(text.decode("utf-8", "replace").replace("\r", "\n")), "next": output.tell()}
        return job

    def stop(self, name: str) -> None:
        """End a job as Ctrl-C does: a run saves after its step. One that has just been started is waited for."""
        lock = self.folder_of(name) / LOCK
        while not holder(lock) and self.job(name)["state"] == RUNNING:
            time.sleep(POLLED)
        interrupt(lock, f"job {name}")

    def folder_of(self, name: str) -> Path:
        folder = self.folder / name
        if not NUMBER.fullmatch(name) or within(self.root, folder) != folder or not folder.is_dir():
            raise UserError(f"there is no job {name}")
        return folder


def interrupt(lock: Path, what: str) -> None:
    """Send Ctrl-C's signal to the process that holds a lock. Raises UserError if there is none on this machine."""
    held = holder(lock)
    if held is None:
        raise UserError(f"{what} does not run")
    process = held.get("process")
    if held.get("host") != platform.node() or not is_whole(process, 2):  # -1: all processes
        raise UserError(f"{what} runs on {held.get('host', 'another machine')}; stop it there")
    os.kill(process, signal.SIGINT)


HOST = "127.0.0.1"
FEEDBACK = "my-feedback.jsonl"  # takes what is said of answers
LISTENS = re.compile(rb": http://127\.0\.0\.1:(\d+)/v1$", re.MULTILINE)  # a server's word
WAITED = 600  # seconds for an answer's next word


def serve(jobs: Jobs, model: str, adapters: Sequence[str] = (), state: str = "", **flags: str) -> str:
    """Start a server of a model, and of adapters and a state as models beside it, with further flags that are not
    empty; -> its job."""
    words = ["serve", "--model", model, "--name", "base", "--port", "0", "--api_key", f"env:{KEY}"]
    words += ["--drain_seconds", "1"]  # who closes it waits for no answer
    words += ["--feedback", FEEDBACK]
    named = [f"adapter{f'-{n}' * (n > 1)}={file}" for n, file in enumerate(adapters, 1)]
    words += ["--adapter", *named] * bool(named) + ["--state", f"state={state}"] * bool(state)
    return jobs.start([*words, *(word for name, value in flags.items() if value for word in (f"--{name}", value))])


def close_chats(jobs: Jobs) -> None:
    """End the servers that this page has opened; no other page shows them."""
    for name in [*jobs.own]:
        with suppress(UserError, OSError):  # it has ended
            if jobs.job(name)["words"][0] == "serve":
                jobs.stop(name)


def port_of(jobs: Jobs, name: str) -> int:
    """The port of a running server. Raises UserError if the job is none, is another page's, with another key, or
    does not listen yet."""
    job = jobs.job(name)
    if name not in jobs.own or job["words"][0] != "serve" or job["state"] != RUNNING:
        raise UserError(f"job {name} serves no model now; open it again")
    if not (listens := LISTENS.search(read(jobs.folder_of(name) / OUTPUT))):
        raise UserError("the model is not loaded yet")
    return int(listens[1])


def ask(jobs: Jobs, name: str, path: str, body: bytes | None = None) -> tuple[int, str, Iterator[bytes]]:
    """Send a request to a job's server -> status, content type, and the answer piece by piece as it comes. Raises
    UserError if it does not listen yet, or no more."""
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


def main(argv: list[str]) -> int:
    """Run the command of a job; signals to this process go to it, so that those of Ctrl-C end a run after its step."""
    folder, words = Path(argv[0]), argv[1:]
    process: subprocess.Popen[bytes] | None = None
    came, early = list[int](), list[int]()  # signals, and those before the command began

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    signal.signal(signal.SIGINT, forward)
    signal.signal(signal.SIGTERM, forward)
    with hold(folder / LOCK), open(folder / OUTPUT, "ab") as output:
        command = python_command("rwkv_peft", *words)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        for number in early:
            process.send_signal(number)
        code = process.wait()
        if came and code == 1:  # Python itself had not begun, and says no more
            code = -came[-1]
        write_text(folder / EXIT, str(code if code >= 0 else 128 - code))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
