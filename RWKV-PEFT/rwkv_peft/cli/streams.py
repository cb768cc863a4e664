"""A command's standard streams. Work goes on if its output cannot be written any more: if a pipe's reader leaves, a
terminal goes away, or the disk of a log is full."""

import codecs
import errno
import io
import os
import sys
from typing import TextIO


def encoded(text: str) -> bytes:
    """A text as UTF-8; a lone surrogate, which that cannot hold, becomes JSON's escape of it."""
    return text.encode("utf-8", "backslashreplace")


class Patient(io.TextIOWrapper):
    """A text stream that falls silent after a failed write; `refused` is the error of that write, or None."""

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
        """Send the rest of the output, buffered text included, to os.devnull."""
        self.refused = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def make_patient() -> None:
    """Make stdout and stderr Patient, and stdin tolerant.

    Closed streams are opened on os.devnull, so that no file takes their numbers. Characters that cannot be encoded, as
    in file names that are not Unicode, are printed escaped; each line is written at once, also into a pipe or a log.
    Input is read in the locale's encoding, or in UTF-8 if that is ASCII; bytes that are no text in it become surrogates
    and raise no error yet.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # any other stream belongs to tests, which read it
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
    """Return whether what is written to a stream still goes anywhere."""
    return not (isinstance(stream, Patient) and stream.refused)


def lost_output() -> str:
    """The reason why standard output is not whole; "" if it is whole, or if its reader left."""
    error = sys.stdout.refused if isinstance(sys.stdout, Patient) else None
    if error is None or error.errno in (None, errno.EPIPE, errno.EIO):
        return ""
    return os.strerror(error.errno).lower()


def bar_seconds(stream: TextIO) -> float:
    """Seconds between two prints of a progress bar: short on a terminal, long in a log, which keeps them all."""
    return 0.2 if stream.isatty() else 10.0
