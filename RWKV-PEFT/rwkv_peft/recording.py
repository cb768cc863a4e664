"""Record what a GPU is asked to do as a CUDA graph, which one launch replays at the same addresses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import UserError, told

WARM_UP = 2  # passes before recording: the first builds kernels, and libraries choose algorithms and allocate


@contextmanager
def aside() -> Iterator[None]:
    """Within, compute on a side stream, as recording does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def recording(graph: Any, pool: Any, remedy: str) -> Iterator[None]:
    """Within, record launches into a torch.cuda.CUDAGraph, with memory of a pool. Raises UserError, which ends with the
    remedy, if the driver cannot."""
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(f"this GPU's driver cannot record what the model does ({told(error)}); {remedy}") from error
