"""The lines of --output: a problem each, behind a first one that says what they are of, so that a run goes on."""

import json
import sys
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from ..errors import UserError
from ..files.alone import alone_at
from ..files.atomic import atomic_write, telling_failures

Record = dict[str, Any]
HEAD = "eval"  # the key of the first line


class Records:
    """{number of a problem: its Record}, kept in a file where there is a path. settings are what must agree for the
    file to be gone on with. To enter it raises UserError where they do not, the file is another tool's, or another
    process writes it."""

    def __init__(self, path: str | None, settings: Record) -> None:
        self.path, self.settings = path, settings
        self.found: dict[int, Record] = {}
        self._file: TextIO | None = None
        self._held = ExitStack()

    def __enter__(self) -> "Records":
        with self._held:
            if self.path is not None:
                self._held.enter_context(alone_at(Path(self.path), partial(print, file=sys.stderr)))
                if Path(self.path).exists():
                    self._read(Path(self.path))
                self._write()  # without a line that was cut off
                self._file = open(self.path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)
            self._held = self._held.pop_all()  # until the end
        return self

    def __exit__(self, *error: object) -> None:
        with self._held:
            if self._file is not None:
                with self._telling():
                    self._file.close()
                self._write()  # in the order of the problems

    def add(self, record: Record) -> None:
        """Keep the Record of a problem, which has its number."""
        self.found[record["number"]] = record
        if self._file is not None:
            with self._telling():
                self._file.write(line(record))

    def _telling(self) -> AbstractContextManager[None]:
        assert self.path is not None
        return telling_failures(Path(self.path), "the answers before are kept, and the same command goes on")

    def ordered(self) -> list[Record]:
        return [self.found[number] for number in sorted(self.found)]

    def _read(self, path: Path) -> None:
        lines = path.read_bytes().splitlines()
        records = [read_line(path, number, text, number == len(lines)) for number, text in enumerate(lines, start=1)]
        head = records[0] if records else {}
        if records and (head is None or HEAD not in head):
            raise UserError(f"--output {path} is another tool's file; choose another name")
        for name, value in self.settings.items():
            if head and head[HEAD].get(name) != value:
                raise UserError(
                    f"--output {path} holds answers of other settings ({name}: {head[HEAD].get(name)!r}, and now "
                    f"{value!r}); choose another name, or delete it"
                )
        self.found = {record["number"]: record for record in records[1:] if record is not None}

    def _write(self) -> None:
        assert self.path is not None
        with atomic_write(self.path) as temporary:
            temporary.write_text(
                "".join(map(line, [{HEAD: self.settings}, *self.ordered()])),
                encoding="utf-8",
                errors="backslashreplace",
            )


def line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_line(path: Path, number: int, text: bytes, last: bool) -> Record | None:
    """The Record of a line; None for the last one where it was cut off in writing. Raises UserError."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        if last and number > 1:
            return None
        raise UserError(
            f"--output {path}, line {number}: not JSON; delete that line, or choose another name"
        ) from error
    if not isinstance(record, dict) or not (HEAD in record if number == 1 else type(record.get("number")) is int):
        raise UserError(f"--output {path}, line {number} is no line of rwkv-peft eval; choose another name")
    return record
