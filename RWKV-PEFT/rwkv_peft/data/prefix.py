"""The names of the files of a token set, before any token is read."""

from pathlib import Path

ENDINGS = (".bin", ".idx", ".mask", ".weights")  # of the files of a set; the last two only if they say something


def binidx_prefix(path: str | Path) -> str:
    """PREFIX, PREFIX.bin or PREFIX.idx -> PREFIX."""
    text = str(path)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


def default_mask(prefix: str | Path) -> str:
    """The --loss_mask of token files if none is given: "file" if they have a .mask file, else "none"."""
    return "file" if Path(binidx_prefix(prefix) + ".mask").is_file() else "none"
