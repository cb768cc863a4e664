"""A short name for a model's weights, to tell that an adapter belongs to it."""

import hashlib
from collections.abc import Iterable

import torch

WINDOWS, WINDOW = 4, 16  # this many runs of this many values are read in each tensor


def fingerprint(state: dict[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> str:
    """A short name for a base model's weights, to tell that an adapter belongs to it.

    SHA-256 over each tensor's key, shape and four evenly spaced runs of 16 values as float32, whatever
    the order of the keys: a few pages of each tensor of a mapped file. The dtype does not enter, so that
    an exact float32 copy of a bfloat16 model has the same fingerprint. It guards against mistakes, not
    against forgery. `state` may be a dict or an iterable of (key, tensor) pairs.
    """
    digests = []
    for key, tensor in state.items() if isinstance(state, dict) else state:
        flat = tensor.detach().reshape(-1)
        last = max(flat.numel() - WINDOW, 0)
        runs = [flat[start : start + WINDOW] for start in (last * i // (WINDOWS - 1) for i in range(WINDOWS))]
        values = torch.cat(runs).float().cpu().numpy().tobytes()
        digests.append(hashlib.sha256(f"{key}|{tuple(tensor.shape)}|".encode() + values).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:32]
