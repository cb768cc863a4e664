"""Encodes chunks of rows in this process or in several workers, which end with it however it ends."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process

from ..children import elsewhere
from ..cli.errors import UserError
from .encode_settings import EncodeSettings
from .encoding import Encoded, encode_chunk
from .rows import Chunk


def encode_all(
    chunks: Iterable[Chunk], settings: EncodeSettings, workers: int = 1, judge: Callable[[], bool] = lambda: False
) -> Iterator[Encoded]:
    """Yield the Encoded of every chunk, in order; at most two chunks a worker are in memory. As soon as judge() is
    true, the chunks that follow are only judged (encode_chunk). Raises UserError if a worker is killed, as the system
    does when memory runs out, or cannot begin."""
    if workers <= 1:
        for chunk in chunks:
            yield encode_chunk(chunk, settings, judge())
        return
    with elsewhere():  # a process that keeps track of the others begins
        pool = ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent)
    with pool:
        waiting: deque[Future[Encoded]] = deque()
        try:
            for chunk in chunks:
                waiting.append(submit(pool, chunk, settings, judge()))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was ended from outside, or could not begin, which happens if memory runs out; give "
                f"fewer than --workers {workers}"
            ) from error
        finally:
            with later_ctrl_c():  # the workers are done after a chunk
                pool.shutdown(wait=True, cancel_futures=True)


def submit(pool: ProcessPoolExecutor, chunk: Chunk, settings: EncodeSettings, judge: bool) -> "Future[Encoded]":
    """Submit a chunk, for which the pool may begin one more process. Raises BrokenProcessPool if it cannot: the system
    has no room for a process, or another one died this moment, which closes the pool's pipes that the new one inherits
    (an OSError or a ValueError, depending on how far it came)."""
    with later_ctrl_c(), elsewhere():  # a new process inherits both
        try:
            return pool.submit(encode_chunk, chunk, settings, judge)
        except (OSError, ValueError) as error:
            raise BrokenProcessPool("a process could not begin") from error


@contextmanager
def later_ctrl_c() -> Iterator[None]:
    """Put Ctrl-C off until the block ends; processes that begin in it never hear it, because their parent does."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))  # if another thread is told
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


def end_with_parent() -> None:
    """End this process when its parent is gone, however that ended."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
