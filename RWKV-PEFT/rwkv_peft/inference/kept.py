"""The file of `generate --output`, which has the line of each prompt as soon as its continuation is done."""

from collections.abc import Callable
from pathlib import Path

from ..checkpoints.atomic import CannotWrite, append_text, telling_failures, write_text
from ..cli.errors import UserError
from .showing import show


class Kept:
    """The lines {number of a prompt: line} of --output, in memory and in the file at path; without a path none is kept.

    Each line is appended as it is added, so that a process which is killed leaves the lines so far; on exit the file is
    written anew in the order of the prompts. A file that was at the path stays until the first line. say(text) is
    called once if the disk refuses a line. If it refuses the lines at exit too, they are printed and UserError is
    raised.

    whole is True once all lines are in the file in order.
    """

    def __init__(self, path: str | None, say: Callable[[str], object]) -> None:
        self.path, self.say = path, say
        self.lines: dict[int, str] = {}
        self.whole = False
        self._refused = False

    def __enter__(self) -> "Kept":
        return self

    def add(self, number: int, line: str) -> None:
        """Add the line of a prompt; it is dropped if there is no path."""
        if self.path is None:
            return
        self.lines[number] = line
        if self._refused:  # the file may end in the middle of a line
            return
        try:
            if len(self.lines) == 1:
                write_text(self.path, line)
                return
            with telling_failures(Path(self.path), "the lines before are kept"):
                append_text(self.path, line)
        except CannotWrite as error:
            self._refused = True
            self.say(f"{error}; the work goes on, and all lines are written at its end")

    def __exit__(self, *error: object) -> None:
        if self.path is None or not self.lines:
            return
        try:
            write_text(self.path, self._text())
        except UserError as refusal:
            show(self._text())
            raise UserError(f"{refusal}; its lines are printed instead") from refusal
        self.whole = True

    def _text(self) -> str:
        return "".join(self.lines[number] for number in sorted(self.lines))
