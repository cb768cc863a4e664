"""How the models' blocks are computed in fewer passes on a GPU: one forward a generation over the parameters of a plain
block, and `fuse`, which decides once which blocks take it."""

from .fuse import Setting, fuse

__all__ = ["Setting", "fuse"]
