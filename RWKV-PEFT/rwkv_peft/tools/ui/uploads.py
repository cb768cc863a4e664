"""Takes files that somebody chose in the browser into the folder of the page, part by part."""

import os
import re
from contextlib import suppress
from itertools import count
from pathlib import Path

from ...checkpoints.atomic import require_room
from ...cli.errors import UserError
from .places import hidden

MOST = 32 << 30  # bytes of a file: a base of 13B in bf16 has 27 GB
LONGEST = 60  # characters of a name
UNUSUAL = re.compile(r"[^\w .+()\[\]-]")  # in a name


def cleaned(name: str) -> str:
    """The last part of a name, without what a shell or a file system reads in a way of its own. Raises UserError if
    nothing is left."""
    name = UNUSUAL.sub("_", re.split(r"[/\\]", name)[-1]).strip(" ._-")
    stem, dot, ending = name.rpartition(".")
    name = f"{stem[: LONGEST - len(ending)]}{dot}{ending}" if stem and len(ending) < 20 else name[:LONGEST]
    if not name:
        raise UserError("the file has no name that can be kept; rename it")
    return name


class Uploads:
    """Files that come into `root`; until one is whole, what came of it lies in a hidden folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / ".rwkv-peft" / "uploads"

    def take(self, name: str, begin: int, size: int, part: bytes) -> str:
        """Add the part from byte `begin` on of a file of `size` bytes -> its name below the root once it is whole, else
        "". No file is replaced: a number makes the name another. Raises UserError for a file that is too large, a part
        that does not follow what came before, and a full disk."""
        name = cleaned(name)
        if not 0 <= begin <= begin + len(part) <= size <= MOST or not (part or not size):
            raise UserError(f"{name}: a file of at most {MOST >> 30} GiB is taken; copy a larger one into the folder")
        path = hidden(self.root, self.folder.name) / f"{name}.part"
        if not begin:
            path.unlink(missing_ok=True)  # of an upload that ended on the way
            require_room("the file", path, size)
        # a link or a pipe of that name may have come with the folder
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | (0 if begin else os.O_CREAT | os.O_EXCL)
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
