"""Draw the seed of --random_seed -1, once for all processes, and keep it when the run resumes."""

import secrets
from argparse import Namespace
from pathlib import Path

from ...errors import UserError
from ..saving.checkpoints import find_checkpoint
from ..saving.run_state import UNREADABLE, read_state
from .world import World

DRAWN = -1  # the value that asks for a drawn seed


def draw_seed(args: Namespace, world: World) -> int:
    """Return the seed of a command with --random_seed -1: the run's own if it resumes, else a new one. Raises UserError
    if several processes of a World would each draw another."""
    checkpoint = find_checkpoint(Path(args.proj_dir)) if args.resume else None
    if checkpoint is not None:
        try:
            return read_state(checkpoint)["config"]["train"]["random_seed"]
        except UNREADABLE:
            pass  # the resume itself says what is wrong with the checkpoint
    if world.nodes > 1 or not world.starts:
        raise UserError(
            f"--random_seed {DRAWN} draws a seed, and each of the processes that are started here would draw another; "
            "give a number"
        )
    return secrets.randbelow(2**31)
