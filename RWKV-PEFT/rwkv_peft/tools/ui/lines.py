"""Reads files that runs and commands write, whatever is in them: the page shows strangers' folders too."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

BYTES = 4 << 20  # of a file, that are read at a time
NESTED = 50  # lists and objects within each other, at most, in a line that is shown
TAIL = 1 << 18  # bytes at the end of a file of answers


def is_plain(path: Path) -> bool:
    """Tell whether a path is a file itself: a pipe would be waited for, and a link may lead anywhere."""
    return path.is_file() and not path.is_symlink()


def read(path: Path, most: int = BYTES) -> bytes:
    """The first bytes of a plain file, b"" if there is none."""
    if not is_plain(path):
        return b""
    with open(path, "rb") as file:
        return file.read(most)


def lines_of(path: Path, begin: int = 0) -> dict[str, Any]:
    """The objects in whole lines of a .jsonl file from byte `begin` on, and `next`, the byte to go on from. A file that
    became shorter, because a run began anew, is read from its start: `again` is then True."""
    if not is_plain(path):
        return {"lines": [], "next": 0, "again": begin > 0}
    with open(path, "rb") as file:
        again = begin > file.seek(0, os.SEEK_END)
        file.seek(0 if again else begin)
        data = file.read(BYTES)
    whole = data[: data.rfind(b"\n") + 1]
    return {"lines": list(objects(whole.splitlines())), "next": (0 if again else begin) + len(whole), "again": again}


def last_of(path: Path, most: int = TAIL) -> list[Any]:
    """The objects in the last lines of a .jsonl file, of `most` bytes together."""
    size = path.stat().st_size if is_plain(path) else 0
    found: list[Any] = lines_of(path, max(size - most, 0))["lines"]
    return found


def objects(lines: Iterable[bytes]) -> Iterator[Any]:
    """Yield the values of lines of JSON; a number that JSON does not have (NaN, 1e999) becomes None, and other lines
    are left out, as are those that nest too deep."""
    for line in lines:
        with suppress(ValueError, RecursionError):
            value = json.loads(line, parse_constant=lambda word: None, parse_float=finite)
            if is_shallow(value, NESTED):
                yield value


def is_shallow(value: Any, most: int) -> bool:
    """Tell whether lists and objects nest in a value at most so deep."""
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return most >= 0 and all(is_shallow(each, most - 1) for each in below)


def finite(text: str) -> float | None:
    return number if math.isfinite(number := float(text)) else None
