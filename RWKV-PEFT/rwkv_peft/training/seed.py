"""--random_seed -1: a seed that is drawn once for all processes, and kept when the run resumes."""

import json
import os
import secrets
import sys
from pathlib import Path

from ..errors import UserError

DRAWN = -1  # the seed that asks for one


def draw_seed(args):
    """The seed of a command with --random_seed -1: the run's own where it resumes, else a new one. Raises UserError
    where several processes would each draw theirs."""
    checkpoint = None
    if args.resume:
        from .saver import find_checkpoint  # which torch comes with

        checkpoint = find_checkpoint(Path(args.proj_dir))
    if checkpoint is not None:
        try:
            return json.loads((checkpoint / "state.json").read_text())["config"]["train"]["random_seed"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # what is wrong with the checkpoint is said where it is read
    several = args.num_nodes > 1 or any(int(os.environ.get(name, 1)) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS"))
    if several:
        raise UserError(
            f"--random_seed {DRAWN} draws a seed, and each of the processes that are started here would draw another; "
            "give a number"
        )
    return secrets.randbelow(2**31)


def share_seed(seed):
    """Write a drawn seed into the command of this process, by which the processes of other devices are started."""
    sys.argv += ["--random_seed", str(seed)]
