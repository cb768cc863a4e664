"""The name that the files of a token set share."""

from pathlib import Path


def binidx_prefix(path: str | Path) -> str:
    """PREFIX, PREFIX.bin or PREFIX.idx -> PREFIX."""
    text = str(path)
    return text[:-4] if text.endswith((".bin", ".idx")) else text
