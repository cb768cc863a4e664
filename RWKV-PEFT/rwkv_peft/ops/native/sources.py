"""Finds the kernels' sources, and the files that a source includes."""

import re
from pathlib import Path

from .library import BuildError

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def source_directory(kind: str) -> Path:
    """The folder of the "cpu" or the "cuda" sources: in the package (in the repository a link), or beside it."""
    package = Path(__file__).resolve().parents[2]
    installed = package / kind
    return installed if installed.is_dir() else package.parents[1] / kind


def included_files(source: str | Path, root: str | Path) -> list[Path]:
    """Every file that `source` includes in quotes, directly or through others; names are relative to the folder `root`.

    Includes in branches that a compiler would skip count too. Raises BuildError if a file is missing.
    """
    found: set[Path] = set()
    waiting = [Path(source)]
    while waiting:
        path = waiting.pop()
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise BuildError(
                f"the kernels' source {path} is missing: {error}; reinstall, or clone the repository"
            ) from error
        new = {Path(root) / name for name in INCLUDE.findall(text)} - found
        found |= new
        waiting += new
    return sorted(found)
