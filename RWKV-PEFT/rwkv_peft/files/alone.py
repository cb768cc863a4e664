"""One run at a time in a folder."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import UserError
from .atomic import check_output, without_empty_folders
from .lock import Busy, hold

LOCK = ".run.lock"


@contextmanager
def alone_in(folder: Path, say: Callable[..., object] = print, flag: str = "--proj_dir") -> Iterator[None]:
    """Hold a run's folder, given as `flag`, which is made where it is missing and removed again where nothing came of
    it. Raises UserError where it cannot be written or another process holds it; where the file system has no locks,
    that is told and the run goes on."""
    real = Path(os.path.realpath(folder))  # of a link that leads to none yet
    with without_empty_folders(real), ExitStack() as stack:
        check_output(flag, folder / "checkpoints" / "state.json", [])
        real.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(hold(folder / LOCK))
        except Busy as error:
            raise UserError(
                f"{flag} {folder}: a run is training there ({error}); wait for it, or name another folder"
            ) from None
        except OSError as error:
            say(f"output    {folder} cannot be locked ({error}): start no second run there")
        yield
