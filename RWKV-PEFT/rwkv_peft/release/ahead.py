"""Computing the next results in threads while the last one is used: order, errors and memory as without threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def ahead(tasks: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Yield task() for each of an iterable of callables, in order; an error of a task is raised in its turn.

    As many threads as torch has compute tasks, each with one thread of torch's own, and at most two results a thread
    wait to be taken. The iterable itself is advanced by the caller's thread.
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
        torch.set_num_threads(threads)  # what threads started from here on have; the workers' calls changed it
