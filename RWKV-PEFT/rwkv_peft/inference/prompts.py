"""Prompts: read from files and encoded as tokens, without torch."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoints.readable import read_short
from ..cli.errors import UserError
from ..data.encoding import parse
from ..data.rows import JSON_ENDINGS, read_rows
from ..data.tokenizer import Tokenizer
from ..data.tools import functions_of

WRITTEN = ("generated", "tokens", "end")  # the fields of an output line that describe the continuation
ENDS = ("end", "stop", "length")
Made = TypeVar("Made")
MOST_BYTES = 1 << 28  # of a text with prompts


def read_prompt_file(path: str | Path) -> list[dict[str, Any]]:
    """The rows [{"prompt": text, …}] of a file of JSON (.jsonl, .ndjson, .jsonl.gz, .json), or of a text with one
    prompt a line ("-": standard input).

    Blank lines are left out, and a row keeps its other fields. Raises UserError for a file that is unreadable or holds
    no prompt, and for a row that is no prompt."""
    if str(path).lower().endswith(JSON_ENDINGS):
        rows = made_of(path, checked, flag="--prompt_file ")
    else:
        rows = [{"prompt": line.rstrip("\r")} for line in read_text(path).split("\n") if line.strip()]
    if not rows:
        raise UserError(f"--prompt_file {path} holds no prompt")
    return rows


def read_text(path: str | Path, flag: str = "--prompt_file") -> str:
    """A text file's content, without the byte order mark that editors on Windows write. Raises UserError if it is
    missing or not UTF-8."""
    try:
        if path == "-":
            text = sys.stdin.read().encode(errors="surrogateescape").decode()  # streams.py made surrogates of bytes
        else:
            text = read_short(Path(path), MOST_BYTES)
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; check the name") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path} is not UTF-8 (byte {error.start}); convert it") from error
    return text.removeprefix("\ufeff")


def read_tools(path: str) -> list[dict[str, Any]]:
    """The functions of the tools in a file of JSON. Raises UserError if it cannot be read or lists none."""
    listed = read_text(path, "--tools")
    try:
        functions = functions_of(listed)
    except UserError as error:
        raise UserError(f"--tools {path}: {error}") from error
    if not functions:
        raise UserError(f"--tools {path} lists no tool; write one, or leave the flag out")
    return functions


def made_of(path: str | Path, make: Callable[[Any], Made], split: str = "", flag: str = "") -> list[Made]:
    """make(row) for each row of a file, or of a split of it. Raises UserError with the place of a row that it
    refuses."""
    found = []
    for place, item in read_rows(path, split):
        if isinstance(item, bytes) and not item.strip():
            continue
        try:
            found.append(make(parse(item)))
        except UserError as error:
            raise UserError(f"{flag}{place}: {error}") from error
    return found


def checked(row: object) -> dict[str, Any]:
    """A prompt's row, unchanged. Raises UserError if it is none, or if it has fields of its own with the names of
    WRITTEN, which would be lost. An earlier output line passes: its fields are written anew."""
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError('an object with a "prompt" that is a text is due, as in {"prompt": "Once upon a time"}')
    before = isinstance(row.get("generated"), str) and isinstance(row.get("tokens"), int) and row.get("end") in ENDS
    if taken := [name for name in WRITTEN if name in row and not before]:
        raise UserError(
            f"the row has a field {' and a field '.join(taken)}, and the output's fields {', '.join(WRITTEN)} would "
            "replace it; rename it"
        )
    return row


def encode(tokenizer: Tokenizer, prompt: str, number: int) -> list[int]:
    """A prompt's tokens; an empty prompt is the token that starts a document. Raises UserError if the tokenizer has no
    such token."""
    tokens = tokenizer.encode(prompt)
    if tokens:
        return tokens
    if tokenizer.end_id is None:
        raise UserError(
            f"prompt {number} is empty, and tokenizer {tokenizer.name} has no token that starts a document; "
            "give a prompt"
        )
    return [tokenizer.end_id]
