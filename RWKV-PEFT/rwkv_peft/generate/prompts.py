"""Prompts as a user gives them, and as tokens."""

import json
import sys
from pathlib import Path
from typing import Any

from ..data.tokenizer import Tokenizer
from ..errors import UserError


def read_prompt_file(path: str) -> list[dict[str, Any]]:
    """[{"prompt": text, …}] of a .jsonl, or of a text with a prompt a line ("-": standard input); blank lines are left
    out. What a .jsonl holds besides the prompt stays with it. Raises UserError."""
    try:
        text = read_input() if path == "-" else Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--prompt_file {path}: {error.strerror}; check the name") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt_file {path} is not UTF-8 (byte {error.start}); convert it") from error
    text = text.removeprefix("\ufeff")  # the byte order mark of editors on Windows is no part of the first prompt
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"--prompt_file {path} holds no prompt")
    if not str(path).endswith((".jsonl", ".json")):
        return [{"prompt": line.rstrip("\r")} for _, line in lines]
    return [read_line(path, number, line) for number, line in lines]


def read_input() -> str:
    """All of standard input, in which bytes that are no text stand as surrogates (streams.py). Raises
    UnicodeDecodeError for them."""
    return sys.stdin.read().encode(errors="surrogateescape").decode()


def read_line(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not JSON ({error}); one object a line is due") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(
            f'{path}, line {number}: an object with a "prompt" that is a text is due, as in '
            '{"prompt": "Once upon a time"}'
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
