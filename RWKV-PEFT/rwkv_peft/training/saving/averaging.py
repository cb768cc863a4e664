"""Measure and save the average of the weights, if the optimizer makes one. Training goes on as if nothing had been."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..optimizers.choice import Averaging
from .partitions import flat_tensors, publish


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """Give the model the weights that are the run's result so far, while within. Every rank enters at once."""
    inner = getattr(optimizer, "optimizer", None)
    if not isinstance(inner, Averaging) or inner.averaging:
        yield
        return
    flats = flat_tensors(optimizer)
    weights = [flat.detach().clone() for flat in flats]
    inner.eval()
    publish(optimizer)
    try:
        yield
    finally:
        inner.train()
        with torch.no_grad():
            for flat, before in zip(flats, weights):
                flat.copy_(before)  # because train() comes back to them but for rounding
        publish(optimizer)
