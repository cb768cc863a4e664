"""Chooses the default --loss_mask, before any token is read."""

from pathlib import Path

from .prefix import binidx_prefix


def default_mask(prefix: str | Path) -> str:
    """The --loss_mask of token files if none is given: "file" if they have a .mask file, else "none"."""
    return "file" if Path(binidx_prefix(prefix) + ".mask").is_file() else "none"
