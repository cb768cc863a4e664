"""Compute the next results in threads while the last one is used, in the same order and with the same errors."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def ahead(tasks: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Yield task() for each of an iterable of callables, in order; a task's error is raised in its turn.

    Tasks run in as many threads as torch has, each with one torch thread. At most three tasks a thread are running or
    have a result that waits to be taken, so memory stays bounded. The caller's thread advances the iterable.
    """
    threads = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > 3 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the workers' calls changed the default of threads started later
