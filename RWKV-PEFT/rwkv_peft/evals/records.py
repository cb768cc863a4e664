"""The lines of --output, one a problem. The first line holds the settings, so that an interrupted run can go on."""

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from ..checkpoints.atomic import telling_failures, write_text
from ..checkpoints.lock import alone_at
from ..cli.errors import UserError
from ..cli.numeric import is_whole
from ..cli.parser import counted

Record = dict[str, Any]
HEAD = "eval"  # the key of the first line


class Records:
    """The Records of problems, `found` {number: Record}, each judged by `measures`, in a file if there is a path."""

    def __init__(self, path: Path | None, settings: Record, measures: Sequence[str]) -> None:
        self.path, self.settings, self.measures = path, settings, measures
        self.found: dict[int, Record] = {}
        self.file: TextIO | None = None

    @classmethod
    @contextmanager
    def open(cls, path: str | None, settings: Record, measures: Sequence[str]) -> "Iterator[Records]":
        """Open the Records of a file, and go on with those of the same settings. In the end the lines are put in the
        order of the problems. Raises UserError if the settings differ, if it is another tool's file, or if another
        process is writing it."""
        records = cls(Path(path) if path else None, settings, measures)
        if records.path is None:
            yield records
            return
        with alone_at(records.path, partial(print, file=sys.stderr)):
            if records.path.exists():
                records.read(records.path)
            records.write(records.path)  # anew, without a last line that was cut off
            records.file = open(records.path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)
            try:
                yield records
            finally:
                with records.telling(records.path):
                    records.file.close()
                if records.found:
                    records.write(records.path)
                else:
                    records.path.unlink()  # a mistaken command stands in the way of no other

    def add(self, record: Record) -> None:
        """Add the Record of a problem, which holds its number."""
        self.found[record["number"]] = record
        if self.path is not None and self.file is not None:
            with self.telling(self.path):
                self.file.write(line(record))

    def ordered(self) -> list[Record]:
        return [self.found[number] for number in sorted(self.found)]

    def telling(self, path: Path) -> AbstractContextManager[None]:
        return telling_failures(path, "the answers before are kept, and the same command goes on")

    def read(self, path: Path) -> None:
        """Read the Records of a file, without a last line that was cut off while it was written. Raises UserError for
        another tool's file, a damaged line, and other settings."""
        head, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
        then = (parsed(head) or {}).get(HEAD)
        if not isinstance(then, dict):
            raise UserError(f"--output {path} is no file of rwkv-peft eval; choose another name")
        for name, value in self.settings.items():
            if then.get(name) != value:
                raise UserError(
                    f"--output {path} holds answers of other settings ({change(name, then.get(name), value)}); choose "
                    "another name, or delete it"
                )
        for number, text in enumerate(lines, start=2):
            record = parsed(text)
            if record is not None and is_answer(record, self.measures):
                self.found[record["number"]] = record
            elif text.endswith(b"\n"):
                raise UserError(
                    f"--output {path}, line {number} is no line of rwkv-peft eval; delete that line, or choose another "
                    "name"
                )

    def write(self, path: Path) -> None:
        write_text(path, "".join(map(line, [{HEAD: self.settings}, *self.ordered()])))


def parsed(text: bytes) -> Record | None:
    """The object of a line of JSON, None if it is none."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def change(name: str, then: Any, now: Any) -> str:
    """Words for a setting's value that differs, or for files whose stamps do."""
    if name == "files" and isinstance(then, dict):
        return "other files: " + ", ".join(path for path in {**then, **now} if then.get(path) != now.get(path))
    return f"{name}: {then!r}, and now {now!r}"


def digest_of(questions: object) -> str:
    """The hash of what is asked: 16 hex digits of SHA-256."""
    return hashlib.sha256(repr(questions).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def is_answer(record: Record, measures: Sequence[str]) -> bool:
    """Tell whether the Record of a problem has its number and its judgements."""
    return is_whole(record.get("number")) and all(type(record.get(name)) is bool for name in measures)


def share_of(measure: str, records: Sequence[Record]) -> float:
    """The share of records that are right by a measure."""
    return sum(bool(record[measure]) for record in records) / len(records)


def standard_error(share: float, total: int) -> float:
    """The standard error of a share among `total` independent answers, by their sample variance; NaN for one."""
    return math.sqrt(share * (1 - share) / (total - 1)) if total > 1 else math.nan


def summary(task: str, measures: Sequence[str], records: Sequence[Record]) -> list[str]:
    """Write the score of records in lines: shares, and the number of answers cut off."""
    total = len(records)
    lines = [f"{task}: {counted(total, 'problem')}"]
    for name in measures:
        share = share_of(name, records)
        error = standard_error(share, total)
        spread = f" ± {error:.1%} (standard error)" if math.isfinite(error) else ""
        lines.append(f"{name:<10} {share:7.1%}{spread}, {share * total:,.0f} of {total:,}")
    long = sum(record.get("end") == "length" for record in records)
    if long:
        lines.append(f"{counted(long, 'answer')} cut off at --max_tokens")
    return lines
