"""The room that a disk has, asked before hours of work rather than after them."""

import os
import sys
from pathlib import Path

from ..errors import UserError


def room_at(path: str | Path) -> int:
    """Bytes that are free for this user on the disk where `path`, which may be still to come, lies."""
    place = Path(os.path.realpath(path))
    disk = os.statvfs(next(folder for folder in (place, *place.parents) if folder.exists()))
    if not disk.f_blocks:  # a file system that does not tell
        return sys.maxsize
    return disk.f_frsize * (disk.f_bavail if os.geteuid() else disk.f_bfree)  # some blocks are kept for root


def require_room(flag: str, path: str | Path, needed: int, what: str = "") -> None:
    """Raise UserError where the disk of `path`, given as `flag`, has fewer bytes free than are needed for `what`."""
    if (free := room_at(path)) < needed:
        raise UserError(
            f"{flag} {path} needs {needed:,} bytes{what and f' for {what}'}, and its disk has {free:,} free; free some "
            "space or choose another disk"
        )
