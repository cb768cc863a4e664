"""Chooses the default --loss_mask, and checks that its markers are given, before any token is read."""

from pathlib import Path

from ..config import DataConfig
from ..errors import UserError
from .prefix import binidx_prefix


def default_mask(prefix: str | Path) -> str:
    """The --loss_mask of token files if none is given: "file" if they have a .mask file, else "none"."""
    return "file" if Path(binidx_prefix(prefix) + ".mask").is_file() else "none"


def require_markers(config: DataConfig) -> None:
    """Raise UserError if config.loss_mask needs markers that are not given."""
    kind = config.loss_mask
    if kind in ("qa", "se") and not config.mask_id:
        raise UserError(
            f"--loss_mask {kind} needs --mask_id, the token ids that open an answer, which rwkv-peft preprocess "
            "--ids 'Assistant:' prints; what RWKV-PEFT's qa takes is "
            """--mask_id '{"mask0":"User:","mask1":"Assistant:"}'"""
        )
    if kind == "se" and not config.mask_end_id:
        raise UserError("--loss_mask se needs --mask_end_id, the token ids that close an answer")
