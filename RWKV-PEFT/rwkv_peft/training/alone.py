"""One run at a time in a folder: a lock that the system lets go of when the process ends, however it ends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UserError


@contextmanager
def alone_in(folder: Path, say: Callable[..., object] = print) -> Iterator[None]:
    """Hold a run's folder, which exists. Raises UserError where another process holds it; where the file system has no
    locks, that is told and the run goes on."""
    lock = FileLock(folder / ".run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"--proj_dir {folder}: another process is training there; wait for it, or name another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        say(f"output    {folder} cannot be locked ({error}): start no second run there")
        yield
        return
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: nobody waits for it
        lock.release()
