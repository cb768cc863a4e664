"""The files that the page shows: those below one folder, read whatever is in them, because strangers' folders are shown
too; and the files that somebody chose in the browser, taken in part by part.
"""

import json
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from ...checkpoints.atomic import require_room
from ...checkpoints.readable import home_meant, within
from ...cli.errors import UserError
from ...system import PLAIN

SHOWN = 2000  # entries of a folder, at most
DEEP = 5  # levels of folders that are looked through
LOOKED = 3000  # folders that are: the page asks every 3 seconds, and a home folder may hold a hundred thousand
SKIPPED = ("checkpoints", "tensorboard", "wandb", "swanlab", "node_modules")


def hidden(root: Path, name: str) -> Path:
    """The folder of that name in the page's own below `root`, made if it is missing. Raises UserError if a link, which
    may have come with the folder, leads elsewhere."""
    folder = root / ".rwkv-peft" / name
    if within(root, folder) != folder:
        raise UserError(f"{folder} leads elsewhere by a link; move it away")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def walk(root: Path) -> Iterator[tuple[Path, dict[str, "os.DirEntry[str]"]]]:
    """Yield the folders from `root` down with {name: entry}, the nearest first, without hidden entries; links to
    folders are not followed."""
    level, looked = [str(root)], 0
    for _ in range(DEEP + 1):
        below = []
        for place in level[: LOOKED - looked]:
            looked += 1
            with suppress(OSError), os.scandir(place) as found:
                entries = {entry.name: entry for entry in found if not entry.name.startswith(".")}
                yield Path(place), entries
                inner = (entry for name, entry in entries.items() if name not in SKIPPED)
                below += [entry.path for entry in inner if entry.is_dir(follow_symlinks=False)]
        level = below


class Places:
    """Reads names of files as paths below `root`; no name leads out of it, through a link neither."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def path(self, name: str) -> Path:
        """The path of a file or folder named from the root. Raises UserError if it is not there, or not below it."""
        path = self.inside(name)
        if not path.exists():
            meant = f"; it is {remark}" if (remark := home_meant(name)) else ""
            raise UserError(f"{name}: there is no such file in {self.root}{meant}")
        return path

    def inside(self, name: str) -> Path:
        """The path of a name that may have no file yet. Raises UserError if it is not below the root."""
        if "\0" in name:
            raise UserError("a file's name has no zero byte")
        path = within(self.root, name)
        if path is None:
            raise UserError(f"{name} is not within {self.root}; start rwkv-peft ui with --files for another folder")
        return path

    def name(self, path: Path) -> str:
        """The name of a path, from the root."""
        return path.relative_to(self.root).as_posix()

    def entries(self, name: str) -> list[dict[str, Any]]:
        """List a folder, folders first, without hidden entries and links that lead out: name, whether it is a
        folder, bytes. Raises UserError if it is no folder, or cannot be read."""
        folder = self.path(name)
        try:
            with os.scandir(folder) as found:
                entries = [entry for entry in found if not entry.name.startswith(".")]
        except NotADirectoryError:
            raise UserError(f"{name} is a file, no folder") from None
        except PermissionError:
            raise UserError(f"{name} may not be read by you") from None
        kept: list[dict[str, Any]] = []
        for entry in entries:
            path = within(self.root, entry.path)
            if path is not None and path.exists():
                is_folder = path.is_dir()
                size = 0 if is_folder else path.stat().st_size
                kept.append({"name": self.name(folder / entry.name), "folder": is_folder, "bytes": size})
        return sorted(kept, key=lambda entry: (not entry["folder"], entry["name"].lower()))[:SHOWN]


BYTES = 4 << 20  # of a file, that are read at a time
NESTED = 50  # lists and objects within each other, at most, in a line that is shown
TAIL = 1 << 18  # bytes at the end of a file of answers


def is_plain(path: Path) -> bool:
    """True if a path is a file itself: a pipe would be waited for, and a link may lead anywhere."""
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
    """True if lists and objects nest in a value at most so deep."""
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return most >= 0 and all(is_shallow(each, most - 1) for each in below)


def finite(text: str) -> float | None:
    return number if math.isfinite(number := float(text)) else None


MOST = 32 << 30  # bytes of a file: a base of 13B in bf16 has 27 GB
LONGEST = 60  # characters of a name
UNUSUAL = re.compile(r"[^\w .+()\[\]-]")  # in a name


def cleaned(name: str) -> str:
    """The last part of a name, without characters that are special in a shell or a file system. Raises UserError if
    nothing is left."""
    name = UNUSUAL.sub("_", re.split(r"[/\\]", name)[-1]).strip(" ._-")
    stem, dot, ending = name.rpartition(".")
    name = f"{stem[: LONGEST - len(ending)]}{dot}{ending}" if stem and len(ending) < 20 else name[:LONGEST]
    if not name:
        raise UserError("the file has no name that can be kept; rename it")
    return name


class Uploads:
    """Files that come into `root`; until one is whole, its beginning lies in a hidden folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / ".rwkv-peft" / "uploads"
        self.taking = threading.Lock()  # requests are served in threads, and names are chosen by what there is

    def take(self, name: str, begin: int, size: int, part: bytes) -> str:
        """Add the part from byte `begin` on of a file of `size` bytes -> its name below the root once it is whole, else
        "". No file is replaced: a number makes the name another. Raises UserError for a file that is too large, a part
        that does not follow the ones before, and a full disk."""
        name = cleaned(name)
        if not 0 <= begin <= begin + len(part) <= size <= MOST or not (part or not size):
            raise UserError(f"{name}: a file of at most {MOST >> 30} GiB is taken; copy a larger one into the folder")
        with self.taking:
            path = hidden(self.root, self.folder.name) / f"{name}.part"
            if not begin:
                path.unlink(missing_ok=True)  # of an upload that ended on the way
                require_room("the file", path, size)
            # a link or a pipe of that name may have come with the folder
            flags = os.O_WRONLY | os.O_APPEND | PLAIN | (0 if begin else os.O_CREAT | os.O_EXCL)
            try:
                with open(os.open(path, flags, 0o666), "ab") as file:
                    if file.tell() != begin:
                        raise UserError(f"{name} comes from another tab too; wait for that, and choose it again")
                    file.write(part)
            except FileNotFoundError:
                raise UserError(f"{name} comes from another tab too; choose it again") from None
            return self.named(path, name) if begin + len(part) == size else ""

    def named(self, path: Path, name: str) -> str:
        """Move a whole file to its name, or to that with a number if there is one -> the name that it has."""
        stem, dot, ending = name.rpartition(".")
        for number in count(1):
            free = name if number == 1 else f"{stem}-{number}{dot}{ending}" if stem else f"{name}-{number}"
            with suppress(FileExistsError):
                os.close(os.open(self.root / free, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                os.replace(path, self.root / free)
                return free
        raise AssertionError
