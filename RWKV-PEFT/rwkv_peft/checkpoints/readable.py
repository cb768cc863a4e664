"""Reads files from anywhere: the one guard that turns damage into a message, checks of paths, and settings in JSON."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..cli.errors import UserError, summarize

WINDOWS = re.compile(r"([A-Za-z]):[\\/](.*)")  # a path with its drive
MOST_BYTES = 1 << 24  # of a text that is read whole, such as a template
SHOWN = 5  # files of a folder that a message names


@contextmanager
def reading(
    path: str | Path, finding: str = "cannot be read", remedy: str = "download or copy it again"
) -> Iterator[None]:
    """Turn whatever a damaged file raises within into a UserError: "PATH FINDING: the library's reason; REMEDY".

    Readers inside are straight code, because libraries raise errors of every type for damaged files. A UserError
    passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} {finding}: {summarize(error)}; {remedy}") from error


def require_file(path: str | Path) -> Path:
    """`path` as a Path. Raises UserError unless it is a file, not a pipe or device, that can be read."""
    return require_readable(path, f"{path} does not exist; check the name", again=True)


def require_readable(path: str | Path, missing: str, again: bool = False) -> Path:
    """`path` as a Path to a file that opens for reading. Raises UserError with the text `missing` if nothing is
    there; also for a folder, a file that may not be read, and a pipe or device if it is to be read `again`."""
    path = Path(path)
    try:
        if os.path.isfile(path):  # opening a pipe would wait for its other end
            open(path, "rb").close()
        else:
            os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a name from a file that can be none
        raise UserError(f"{path}: {meant}" if (meant := home_meant(path)) else missing) from None
    except OSError as error:
        raise UserError(
            f"{path} exists, but may not be read ({os.strerror(error.errno or 0).lower()}); give yourself the "
            "permission, or copy it"
        ) from error
    if path.is_dir():
        raise UserError(f"{path} is a folder, and a file is due{choice_in(path)}")
    if again and not path.is_file():
        raise UserError(
            f"{path} is a pipe or a device, which cannot be read twice; write it into a file, and give that"
        )
    return path


def within(root: Path, name: str | Path) -> Path | None:
    """Follow the links of a name below `root`, a path without any; None if they lead out of it."""
    path = Path(os.path.realpath(root / name))
    # before Python 3.13 nothing behind a link to itself is followed
    return path if path.is_relative_to(root) and os.path.realpath(path) == str(path) else None


def home_meant(path: str | Path) -> str:
    """The remark on a path with a ~ that no shell has replaced, as behind a flag's = or in quotes, and on one of
    Windows; "" for any other path."""
    meant, windows = os.path.expanduser(path), WINDOWS.fullmatch(str(path))
    if (meant == str(path) and not windows) or os.path.lexists(Path(path).parts[0]):
        return ""
    if windows:
        return f"a path of Windows; in WSL give /mnt/{windows[1].lower()}/" + windows[2].replace("\\", "/")
    return f"a shell replaces ~ by the home folder only at the start of a word, and so not here; give {meant}"


def choice_in(folder: str | Path, *endings: str) -> str:
    """The end of a message about a folder given in place of a file: "; give one of …" with its first files that have
    one of the endings (none given: any), or "" if there are none or the folder cannot be read."""
    try:
        names = sorted(str(path) for path in Path(folder).iterdir() if path.is_file())
    except OSError:
        return ""
    names = [name for name in names if not endings or name.endswith(endings)]
    more = ", …" if len(names) > SHOWN else ""
    return f"; give {'one of ' * (len(names) > 1)}{', '.join(names[:SHOWN])}{more}" if names else ""


def read_short(path: Path, most: int = MOST_BYTES, given: str = "") -> str:
    """The text of a file in UTF-8, with any line ends, of at most `most` bytes. `given` names it in messages."""
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{given or path} has more than {most:,} bytes, which no file of its kind has; name another")
    return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def files_below(path: str | Path) -> list[Path]:
    """The file at a path, or all files below a folder."""
    path = Path(path)
    return sorted(filter(Path.is_file, path.rglob("*"))) if path.is_dir() else [path]


def object_of(text: str | bytes) -> dict[str, Any]:
    """The object that a text is in JSON, {} if it is none."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        return value if isinstance(value, dict) else {}
    return {}


def object_in(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is none, or none that can be read."""
    with suppress(OSError):
        if os.path.isfile(path):
            return object_of(Path(path).read_bytes())
    return {}


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if there is none."""
    with reading(require_file(path), "is not JSON", "copy it again"):
        settings = json.loads(path.read_bytes())
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings, but a {type(settings).__name__}; copy it again")
    return settings
