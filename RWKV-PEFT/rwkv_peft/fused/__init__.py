"""Computes the models' blocks in fewer passes on a GPU: one forward per generation, over the parameters of a plain
block, and `fuse`, which decides once which blocks take it."""

from .fuse import Setting, fuse

__all__ = ["Setting", "fuse"]
