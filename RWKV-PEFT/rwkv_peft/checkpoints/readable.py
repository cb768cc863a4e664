"""Checks that a file can be read before any work begins, with an error for each obstacle, and reads settings."""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..cli.errors import UserError, told

WINDOWS = re.compile(r"([A-Za-z]):[\\/](.*)")  # a path with its drive
MOST_BYTES = 1 << 24  # of a JSON object that tells of other files, whose values may take twenty times as much memory
SHOWN = 5  # files of a folder that a message names


def require_readable(path: str | Path, missing: str, again: bool = False) -> Path:
    """Return `path` as a Path to a file that opens for reading. Raises UserError with the text `missing` if nothing is
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
    """The remark on a path whose ~ no shell has replaced, as behind a flag's = or in quotes, and on one of Windows; ""
    for any other path."""
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
        found = sorted(str(path) for path in Path(folder).iterdir() if path.is_file())
    except OSError:
        return ""
    found = [name for name in found if not endings or name.endswith(endings)]
    more = ", …" if len(found) > SHOWN else ""
    return f"; give {'one of ' * (len(found) > 1)}{', '.join(found[:SHOWN])}{more}" if found else ""


def read_short(path: Path, most: int = MOST_BYTES, given: str = "") -> str:
    """Read a text in UTF-8, with any line ends. Raises UserError for one of more than `most` bytes, because a device
    has no end; `given` names it there with its flag."""
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
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def object_in(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file of at most MOST_BYTES, {} if there is none, or none that can be read."""
    with suppress(OSError):
        if os.path.isfile(path) and os.path.getsize(path) <= MOST_BYTES:
            return object_of(Path(path).read_bytes())
    return {}


def read_settings(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Raises UserError if it holds none, or is a pipe, a device or too large."""
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} is no file of settings, of at most {MOST_BYTES >> 20} MiB; copy it again")
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {told(error)}; copy it again") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings, but a {type(settings).__name__}; copy it again")
    return settings
