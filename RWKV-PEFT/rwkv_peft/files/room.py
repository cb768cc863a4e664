"""Checks a disk's free space before hours of work, not after them."""

import os
import sys
from pathlib import Path

from ..errors import UserError


def room_at(path: str | Path) -> int:
    """The bytes free for this user on the disk of `path`, which need not exist yet."""
    place = Path(os.path.realpath(path))
    disk = os.statvfs(next(folder for folder in (place, *place.parents) if folder.exists()))
    if not disk.f_blocks:  # a file system that does not tell
        return sys.maxsize
    return disk.f_frsize * (disk.f_bavail if os.geteuid() else disk.f_bfree)  # some blocks are kept for root


def require_room(flag: str, path: str | Path, needed: int, what: str = "") -> None:
    """Raise UserError if the disk of `path`, given as `flag`, has fewer bytes free than are needed for `what`."""
    if (free := room_at(path)) < needed:
        raise UserError(
            f"{flag} {path} needs {needed:,} bytes{what and f' for {what}'}, and its disk has {free:,} free; free some "
            "space or choose another disk"
        )
