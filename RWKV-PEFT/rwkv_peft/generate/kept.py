"""The file of `generate --output`: the line of each prompt is in it as soon as its continuation is done."""

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..files.atomic import CannotWrite, atomic_write, telling_failures
from .showing import show


class Kept:
    """{number of a prompt: its line}, in a file where there is a path: appended as they are added, so that a process
    which is killed leaves those before, and in the order of the prompts when this is left. What stood at the path stays
    there until the first line. say(text) is told what the disk refuses meanwhile.

    whole: whether all lines stand in the file in their order. To leave it raises UserError where the disk refuses them
    then, too, and prints them.
    """

    def __init__(self, path: str | None, say: Callable[[str], object]) -> None:
        self.path, self.say = path, say
        self.lines: dict[int, str] = {}
        self.whole = False
        self._refused = False

    def __enter__(self) -> "Kept":
        return self

    def add(self, number: int, line: str) -> None:
        """Keep the line of a prompt."""
        if self.path is None:
            return
        self.lines[number] = line
        if self._refused:  # perhaps in the middle of a line
            return
        try:
            if len(self.lines) == 1:
                self._write(self.path)
                return
            with telling_failures(Path(self.path), "the lines before are kept"), open(self.path, "ab") as file:
                file.write(encoded(line))
        except CannotWrite as error:
            self._refused = True
            self.say(f"{error}; the work goes on, and all lines are written at its end")

    def __exit__(self, *error: object) -> None:
        if self.path is None or not self.lines:
            return
        try:
            self._write(self.path)
        except UserError as refusal:
            show(self._text())
            raise UserError(f"{refusal}; its lines are printed instead") from refusal
        self.whole = True

    def _write(self, path: str) -> None:
        with atomic_write(path) as temporary:
            temporary.write_bytes(encoded(self._text()))

    def _text(self) -> str:
        return "".join(self.lines[number] for number in sorted(self.lines))


def encoded(text: str) -> bytes:
    """A lone surrogate of a row, which UTF-8 has no bytes for, as JSON's escape of it."""
    return text.encode("utf-8", "backslashreplace")
