"""A command's standard streams. Those that it prints to outlast whoever reads them: work goes on where a pipe's reader
leaves, a terminal goes away, or the disk of a log is full."""

import codecs
import errno
import io
import os
import sys
from typing import TextIO


class Patient(io.TextIOWrapper):
    """A stream of text that says nothing more once a word was refused; `refused` tells why it was."""

    refused: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.fall_silent(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.fall_silent(error)

    def fall_silent(self, error: OSError) -> None:
        """Let what is written from now on go nowhere, and what is still held here too."""
        self.refused = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def make_patient() -> None:
    """Make the standard streams Patient. Those that are closed lead nowhere, so that no file takes their numbers. What
    a file's names hold may be no Unicode, and is shown escaped; each line is written at once, into a pipe or a log
    too. What is read and is no text of the locale's encoding, or of UTF-8 where that is ASCII, is no error yet: its
    bytes become surrogates."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest number that is free
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # another one is that of tests, which read it
            encoding = stream.encoding if stream is not None else "utf-8"
            file = open(number, "wb", closefd=False)
            setattr(sys, name, Patient(file, encoding, "backslashreplace", line_buffering=True))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)
    if isinstance(sys.stdin, io.TextIOWrapper):
        plain = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if plain else None, errors="surrogateescape")


def is_heard(stream: object) -> bool:
    """Whether a stream still leads anywhere."""
    return not (isinstance(stream, Patient) and stream.refused)


def lost_output() -> str:
    """Why standard output is not whole; "" where it is, or where whoever read it left."""
    error = sys.stdout.refused if isinstance(sys.stdout, Patient) else None
    if error is None or error.errno in (None, errno.EPIPE, errno.EIO):
        return ""
    return os.strerror(error.errno).lower()


def bar_seconds(stream: TextIO) -> float:
    """Seconds between two looks at a progress bar: a log keeps them all."""
    return 0.2 if stream.isatty() else 10.0
