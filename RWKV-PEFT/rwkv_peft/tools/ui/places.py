"""The files that the page shows: those below one folder."""

import os
from pathlib import Path
from typing import Any

from ...checkpoints.readable import home_meant, within
from ...cli.errors import UserError

SHOWN = 2000  # entries of a folder, at most


def hidden(root: Path, name: str) -> Path:
    """The folder of that name in the page's own below `root`, made if it is missing. Raises UserError if a link, which
    may have come with the folder, leads elsewhere."""
    folder = root / ".rwkv-peft" / name
    if within(root, folder) != folder:
        raise UserError(f"{folder} leads elsewhere by a link; move it away")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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
