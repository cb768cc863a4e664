"""The lines of --output, one a problem. The first line holds the settings, so that an interrupted run can go on."""

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from ..cli import counted
from ..errors import UserError
from ..files.atomic import telling_failures, write_text
from ..files.lock import alone_at
from ..numeric import is_whole

Record = dict[str, Any]
HEAD = "eval"  # the key of the first line


class Records:
    """The Records, {number of a problem: Record}, kept in a file if there is a path; each is judged by `measures`.

    A file with the same settings is continued. Entering raises UserError if its settings differ, if it is another
    tool's file, or if another process is writing it. On exit the lines are put in the order of the problems.
    """

    def __init__(self, path: str | None, settings: Record, measures: Sequence[str]) -> None:
        self.path, self.settings, self.measures = path, settings, measures
        self.found: dict[int, Record] = {}
        self._file: TextIO | None = None
        self._held = ExitStack()

    def __enter__(self) -> "Records":
        with self._held:
            if self.path is not None:
                self._held.enter_context(alone_at(Path(self.path), partial(print, file=sys.stderr)))
                if Path(self.path).exists():
                    self._read(Path(self.path))
                self._write()  # anew, without a last line that was cut off
                self._file = open(self.path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)
            self._held = self._held.pop_all()  # keep the lock until __exit__
        return self

    def __exit__(self, *error: object) -> None:
        with self._held:
            if self._file is not None:
                with self._telling():
                    self._file.close()
                if self.found:
                    self._write()  # in the order of the problems
                else:
                    Path(self._file.name).unlink()  # a mistaken command stands in the way of no other

    def add(self, record: Record) -> None:
        """Add the Record of a problem, which holds its number."""
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
        records = [self._read_line(number, text, number == len(lines)) for number, text in enumerate(lines, start=1)]
        head = records[0] if records else None
        for name, value in self.settings.items():
            if head and head[HEAD].get(name) != value:
                raise UserError(
                    f"--output {path} holds answers of other settings ({change(name, head[HEAD].get(name), value)}); "
                    "choose another name, or delete it"
                )
        self.found = {record["number"]: record for record in records[1:] if record is not None}

    def _read_line(self, number: int, text: bytes, last: bool) -> Record | None:
        """Parse a line -> its Record; None for a last line that was cut off while it was written. Raises UserError for
        any other line that `rwkv-peft eval` did not write."""
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            if last and number > 1:
                return None
            raise UserError(
                f"--output {self.path}, line {number}: not JSON; delete that line, or choose another name"
            ) from error
        known = isinstance(record, dict) and (
            isinstance(record.get(HEAD), dict) if number == 1 else is_answer(record, self.measures)
        )
        if not known:
            raise UserError(f"--output {self.path}, line {number} is no line of rwkv-peft eval; choose another name")
        return record

    def _write(self) -> None:
        assert self.path is not None
        write_text(self.path, "".join(map(line, [{HEAD: self.settings}, *self.ordered()])))


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
    """Tell whether the Record of a problem has its number, its judgements, and probabilities if it has any."""
    judged = all(type(record.get(name)) is bool for name in measures)
    logprobs = record.get("logprobs", [])
    told = isinstance(logprobs, list) and all(isinstance(value, float) for value in logprobs)
    return judged and told and is_whole(record.get("number"))


def share_of(measure: str, records: Sequence[Record]) -> float:
    """The share of records that are right by a measure."""
    return sum(bool(record[measure]) for record in records) / len(records)


def standard_error(share: float, total: int) -> float:
    """The standard error of a share among `total` independent answers, by their sample variance; NaN for one."""
    return math.sqrt(share * (1 - share) / (total - 1)) if total > 1 else math.nan


def summary(task: str, measures: Sequence[str], records: Sequence[Record]) -> list[str]:
    """Write the score of records in lines: shares, answers cut off, and the perplexity of single continuations."""
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
    alone = [record["logprobs"][0] for record in records if len(record.get("logprobs", ())) == 1]
    if alone:
        mean = sum(alone) / len(alone)
        lines.append(f"perplexity {math.exp(min(-mean, 700.0)):.4g} of the last word")
    return lines
