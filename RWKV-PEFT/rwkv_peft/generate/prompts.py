"""Prompts as a user gives them, and as tokens."""

import sys
from pathlib import Path
from typing import Any

from ..data.encoding import parse
from ..data.rows import JSON_ENDINGS, held_chunks
from ..data.tokenizer import Tokenizer
from ..errors import UserError

WRITTEN = ("generated", "tokens", "end")  # what a line that is written says of its prompt's continuation
ENDS = ("end", "stop", "length")


def read_prompt_file(path: str | Path) -> list[dict[str, Any]]:
    """[{"prompt": text, …}] of a file of JSON (.jsonl, .ndjson, .jsonl.gz, .json), or of a text with a prompt a line
    ("-": standard input); blank lines are left out. What a row holds besides the prompt stays with it. Raises
    UserError."""
    if str(path).lower().endswith(JSON_ENDINGS):
        rows = read_rows(path)
    else:
        rows = [{"prompt": line.rstrip("\r")} for line in read_text(path).split("\n") if line.strip()]
    if not rows:
        raise UserError(f"--prompt_file {path} holds no prompt")
    return rows


def read_text(path: str | Path) -> str:
    """A text, without the byte order mark of editors on Windows."""
    try:
        text = read_input() if path == "-" else Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--prompt_file {path}: {error.strerror}; check the name") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt_file {path} is not UTF-8 (byte {error.start}); convert it") from error
    return text.removeprefix("\ufeff")


def read_input() -> str:
    """All of standard input, in which bytes that are no text stand as surrogates (streams.py). Raises
    UnicodeDecodeError for them."""
    return sys.stdin.read().encode(errors="surrogateescape").decode()


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    rows = []
    for chunk in held_chunks(path):
        for number, item in enumerate(chunk.items, start=chunk.first):
            if isinstance(item, bytes) and not item.strip():
                continue
            try:
                rows.append(checked(parse(item)))
            except UserError as error:
                raise UserError(f"--prompt_file {path}, {chunk.unit} {number}: {error}") from error
    return rows


def checked(row: object) -> dict[str, Any]:
    """The row of a prompt. Raises UserError for what is none, or has fields that its line would not keep; those of a
    line that was written before are made anew."""
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError('an object with a "prompt" that is a text is due, as in {"prompt": "Once upon a time"}')
    before = isinstance(row.get("generated"), str) and isinstance(row.get("tokens"), int) and row.get("end") in ENDS
    if taken := [name for name in WRITTEN if name in row and not before]:
        raise UserError(
            f"the row has a field {' and a field '.join(taken)} of its own, where what is generated is written as "
            f"{', '.join(WRITTEN)}, so that it would be lost; call it otherwise"
        )
    return row


def encode(tokenizer: Tokenizer, prompt: str, number: int) -> list[int]:
    """The tokens of a prompt; an empty one is the start of a document."""
    tokens = tokenizer.encode(prompt)
    if tokens:
        return tokens
    if tokenizer.end_id is None:
        raise UserError(
            f"prompt {number} is empty, and tokenizer {tokenizer.name} has no token that starts a document; "
            "give a prompt"
        )
    return [tokenizer.end_id]
