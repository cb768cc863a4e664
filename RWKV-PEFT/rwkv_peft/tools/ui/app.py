"""The page's server: its files, and their requests, answered as JSON."""

import argparse
import json
import mimetypes
import os
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, RedirectResponse, Response, StreamingResponse
from pydantic import AfterValidator, BaseModel, Field

from ... import __version__
from ...checkpoints.lock import LOCK
from ...children import python_command
from ...cli.errors import UserError, visible
from ...cli.names import CARD, DOCUMENT_ENDS, GGUF_TYPES, METRICS
from ...cli.parser import codec
from ...data.chat import THINK
from ...inference.serve.web import Body, Gate, new_app
from ...inference.settings import Sampling
from .. import demo
from ..download import MIRROR, REPOSITORY, SIZES
from .files import Places, Uploads, is_plain, last_of, lines_of, read
from .form import chat_form, form
from .jobs import FEEDBACK, Jobs, ask, interrupt, serve
from .proposals import proposals
from .runs import ANSWERS, described, find_runs, folder_of, measured, take_back, taken
from .written import MINE, EditedRows

PAGE = Path(__file__).parent / "page"
FILES = "/api/files"  # takes the bytes of files, in parts
PACKAGES = ("gguf", "huggingface_hub")  # of files for llama.cpp, and of the hub
PLANNED = 120  # seconds for a plan or a preview
REMEMBERED = 400 * 24 * 3600  # seconds that a browser keeps the key
LOCKED = """<!doctype html><html lang="en"><meta charset="utf-8"><title>rwkv-peft</title>
<h1>This page needs its key</h1>
<p>Open the address that <code>rwkv-peft ui</code> printed in its terminal, behind the word <code>page</code>.
This browser then remembers the key until the command is started anew.</p>
<p lang="zh">请打开 <code>rwkv-peft ui</code> 在终端里打印的地址，在 <code>page</code> 后面。</p>
"""


def word(text: str) -> str:
    """A text that may be an argument of a command, or a file's name. Raises ValueError for a zero byte, and for half of
    a surrogate pair."""
    if b"\0" in os.fsencode(text):
        raise ValueError("a zero byte stands in it")
    return text


def known_codec(text: str) -> str:
    """The name of an encoding of texts. Raises ValueError for any other text."""
    try:
        return codec(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None


Word = Annotated[str, AfterValidator(word)]
Place = Annotated[int, Query(ge=0, lt=1 << 63)]  # in a file


class Words(BaseModel):
    """A command's words, without `rwkv-peft`."""

    words: list[Word]


class Rows(BaseModel):
    """A file for a preview, and how to read it."""

    path: Word
    tokenizer: Word = "world"
    data_type: Word = "sft"
    sft_field: list[Word] = []
    sft_as: Word = ""
    sft_think: Literal["", "on", "off"] = ""
    tool_form: Literal["", "g1", "hermes"] = ""
    turns_in_text: Literal["", "auto"] = ""
    encoding: Annotated[str, AfterValidator(known_codec)] = ""
    document_end: Annotated[str, Field(pattern=f"^({'|'.join(DOCUMENT_ENDS)})?$")] = ""


class RowTurn(BaseModel):
    """What somebody says in a row, and what a model thought before."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)
    reasoning_content: str = ""


class RowChange(BaseModel):
    """A row that is added, replaced (number, was) or deleted (no messages)."""

    path: Word = MINE
    number: Annotated[int, Field(ge=0)] | None = None
    was: list[Any] | None = None
    messages: Annotated[list[RowTurn], Field(min_length=1)] | None = None


class Folder(BaseModel):
    folder: Word


class Chat(BaseModel):
    """A model for a chat, with adapters and a state that answer beside it."""

    model: Word
    adapters: list[Word] = []
    state: Word = ""
    tokenizer: Word = ""
    weights: Word = ""


def missing() -> list[str]:
    """The packages that some of the page's commands need and that this installation lacks."""
    return [package for package in PACKAGES if find_spec(package) is None]


def streamed(status: int, kind: str, pieces: Iterator[bytes]) -> Response:
    return StreamingResponse(pieces, status, media_type=kind)


def make_app(root: Path, jobs: Jobs, gate: Gate) -> FastAPI:
    """The application that shows the files below `root` and starts commands there, behind a gate that is open at /."""
    places = Places(root)
    uploads, edited = Uploads(places.root), EditedRows(places)
    app = new_app("rwkv-peft")

    def page(name: str) -> Callable[[], Response]:
        kind = mimetypes.guess_type(name)[0] or "text/plain"
        return lambda: Response((PAGE / name).read_bytes(), media_type=kind)

    @app.get("/")
    def index(request: Request, key: str = "") -> Response:
        """The page, if the browser has the key: the printed address puts it into a cookie, and out of the address."""
        if gate.is_key(key):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(gate.cookie, key, max_age=REMEMBERED, httponly=True, samesite="lax")
            return answer
        return page("index.html")() if gate.has_key(request.headers) else Response(LOCKED, 401, media_type="text/html")

    for file in sorted(PAGE.rglob("*.*")):
        name = file.relative_to(PAGE).as_posix()
        app.get(f"/page/{name}")(page(name))

    @app.get("/api/about")
    def about() -> dict[str, Any]:
        about = {"version": __version__, "root": str(places.root), "demo": demo.settings()}
        return about | {
            "official": SIZES,
            "repository": REPOSITORY,
            "mirror": MIRROR,
            "form": form(),
            "chat": chat_form(),
            "think": [*THINK],
            "sampling": {"temperature": Sampling.temperature, "top_p": Sampling.top_p},
            "gguf": GGUF_TYPES,
            "mine": MINE,
            "feedback": FEEDBACK,
            "missing": missing(),
        }

    @app.get("/api/proposals")
    def proposed() -> dict[str, list[dict[str, Any]]]:
        return proposals(places)

    @app.get(FILES)
    def files(path: str = "") -> list[dict[str, Any]]:
        return places.entries(path)

    @app.post(FILES)
    async def upload(request: Request, name: str, begin: Place, size: Place) -> dict[str, str]:
        return {"name": await run_in_threadpool(uploads.take, name, begin, size, await request.body())}

    @app.get("/api/download")
    def download(path: str) -> Response:
        found = places.path(path)
        if not is_plain(found):
            raise UserError(f"{path} is no file")
        return FileResponse(found, media_type="application/octet-stream", filename=found.name)

    @app.post("/api/preview")
    def preview(rows: Rows) -> Response:
        path = places.name(places.path(rows.path))  # messages name the file as the page does
        _, text = finished("rwkv_peft.tools.ui.preview", json.dumps(rows.model_dump() | {"path": path}))
        try:
            found = json.loads(text.splitlines()[-1])
        except (ValueError, IndexError):
            raise UserError(*f"{rows.path} could not be read: {text[-500:] or 'no answer'}".splitlines()) from None
        if "error" in found:  # beside what the page offers to read the file otherwise
            return Body(found | {"error": {"message": visible(str(found["error"]))}}, 400)
        return Body(found)

    @app.get("/api/rows")
    def rows(path: str = MINE) -> dict[str, Any]:
        return edited.rows(path)

    @app.post("/api/rows")
    def put_row(change: RowChange) -> dict[str, Any]:
        turns = change.messages and [turn.model_dump(exclude_defaults=True) for turn in change.messages]
        return edited.put(change.path, change.number, change.was, turns)

    @app.post("/api/plan")
    def plan(command: Words) -> dict[str, Any]:
        code, text = finished("rwkv_peft", "plan", *command.words)
        return {"code": code, "text": visible(text), "time": None if code == 2 else measured(places, command.words)}

    @app.post("/api/check")
    def check(command: Words) -> dict[str, Any]:
        code, text = finished("rwkv_peft.tools.ui.check", *command.words)
        return {"code": code, "text": visible(text)}

    def finished(module: str, *words: str) -> tuple[int, str]:
        """Run a module in the root -> its exit code and output."""
        try:
            done = subprocess.run(
                python_command(module, *words),
                cwd=places.root,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=PLANNED,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"no answer within {PLANNED} seconds") from None
        return done.returncode, done.stdout.decode("utf-8", "replace")

    @app.get("/api/jobs")
    def all_jobs() -> list[dict[str, Any]]:
        return jobs.all()

    @app.post("/api/jobs")
    def start(command: Words) -> dict[str, str]:
        return {"id": jobs.start(command.words)}

    @app.get("/api/jobs/{name}")
    def job(name: str, begin: Place = 0) -> dict[str, Any]:
        return jobs.read(name, begin)

    @app.post("/api/jobs/{name}/stop")
    def stop(name: str) -> dict[str, str]:
        jobs.stop(name)
        return {"id": name}

    @app.get("/api/runs")
    def runs() -> list[dict[str, Any]]:
        return find_runs(places, jobs.all())

    @app.get("/api/runs/one")
    def one_run(folder: str) -> dict[str, Any]:
        trains = (job for job in jobs.all() if job["words"][0] == "train")
        return described(
            places, folder, next((job for job in trains if folder_of(places, job["words"]) == folder), None)
        )

    @app.get("/api/runs/metrics")
    def metrics(folder: str, begin: Place = 0) -> dict[str, Any]:
        return lines_of(places.inside(f"{folder}/{METRICS}"), begin)

    @app.get("/api/runs/answers")
    def answers(folder: str) -> dict[str, Any]:
        return {name: last_of(places.inside(f"{folder}/{name}")) for name in ANSWERS}

    @app.get("/api/runs/taken")
    def to_take(folder: str) -> dict[str, Any]:
        return taken(places, folder)

    @app.post("/api/runs/take_back")
    def taken_back(run: Folder) -> dict[str, str]:
        take_back(places, run.folder)
        return {"folder": run.folder}

    @app.post("/api/runs/stop")
    def stop_run(run: Folder) -> dict[str, str]:
        interrupt(places.path(run.folder) / LOCK, f"the run in {run.folder}")
        return {"folder": run.folder}

    @app.post("/api/chat")
    def open_chat(chat: Chat) -> dict[str, str]:
        return {"id": serve(jobs, **chat.model_dump())}

    @app.get("/api/chat/{name}/v1/models")
    def models(name: str) -> Response:
        return streamed(*ask(jobs, name, "v1/models"))

    @app.post("/api/chat/{name}/v1/chat/completions")
    def completions(name: str, request: dict[str, Any]) -> Response:
        return streamed(*ask(jobs, name, "v1/chat/completions", json.dumps(request).encode()))

    @app.post("/api/chat/{name}/v1/feedback")
    def feedback(name: str, body: dict[str, Any]) -> Response:
        return streamed(*ask(jobs, name, "v1/feedback", json.dumps(body).encode()))

    @app.get("/api/runs/card")
    def card(folder: str) -> dict[str, str]:
        return {"text": read(places.inside(f"{folder}/{CARD}")).decode("utf-8", "replace")}

    return app
