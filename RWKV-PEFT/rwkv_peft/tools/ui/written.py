"""Rows that are written on the page: conversations in the lines of a .jsonl, each added, replaced or deleted."""

import json
from pathlib import Path
from threading import Lock
from typing import Any

from ...checkpoints.atomic import atomic_write
from ...cli.errors import UserError
from .files import Places, is_plain, objects

MINE = "my-rows.jsonl"
MOST = 16 << 20  # bytes of a file that is edited here: each change writes all of it


class EditedRows:
    """The rows of files below a root. A row has the number of its line. A change says what stood there, so
    that a second tab replaces nothing that it has not shown."""

    def __init__(self, places: Places) -> None:
        self.places, self.lock = places, Lock()

    def rows(self, name: str) -> dict[str, Any]:
        """{"path", "rows": [{"number", "messages"}], "others": the rows of other forms, which stay as they are} of a
        file, which need not be there yet."""
        lines = self.lines(self.path(name))
        found = [(number, conversation_of(line)) for number, line in enumerate(lines) if line.strip()]
        rows = [{"number": number, "messages": messages} for number, messages in found if messages is not None]
        return {"path": name, "rows": rows, "others": len(found) - len(rows)}

    def put(self, name: str, number: int | None, was: list[Any] | None, messages: list[Any] | None) -> dict[str, Any]:
        """Replace the row of a line by one of messages, or delete it for None; without a number, add one at the end
        -> rows(name). Raises UserError if the line does not hold `was` any more."""
        row = json.dumps({"messages": messages}, ensure_ascii=False).encode()
        written = [] if messages is None else [row]
        with self.lock:
            path = self.path(name)
            lines = self.lines(path)
            if number is None:
                lines += written
            elif number >= len(lines) or conversation_of(lines[number]) != was:
                raise UserError(f"row {number + 1} of {name} was changed elsewhere; look at it again")
            else:
                lines[number : number + 1] = written
            with atomic_write(path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in lines))
        return self.rows(name)

    def path(self, name: str) -> Path:
        path = self.places.inside(name)
        if path.suffix != ".jsonl" or not path.parent.is_dir():
            raise UserError(f"{name}: rows are written to a .jsonl in a folder that is there")
        if path.exists() and (not is_plain(path) or path.stat().st_size > MOST):
            raise UserError(f"{name} is too large, or no plain file; edit it with a program for texts")
        return path

    def lines(self, path: Path) -> list[bytes]:
        return path.read_bytes().splitlines() if path.exists() else []


def conversation_of(line: bytes) -> list[dict[str, Any]] | None:
    """The turns of a line, if it is a row of texts by the three roles and nothing else; else None."""
    match next(objects([line]), None):
        case {"messages": [_, *_] as messages, **others} if not others:
            fields = {"role", "content", "reasoning_content"}
            plain = all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() <= fields for turn in messages)
            if plain and all(isinstance(value, str) for turn in messages for value in turn.values()):
                return messages if {turn["role"] for turn in messages} <= {"system", "user", "assistant"} else None
    return None
