"""Fingerprints of models, to tell that an adapter belongs to one."""

import hashlib
from collections.abc import Iterable

import torch

WINDOWS, WINDOW = 4, 16  # this many runs of this many values are read in each tensor


def fingerprint(state: dict[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> str:
    """A short name for a base model's weights, to tell that an adapter belongs to it.

    It is the first half of a SHA-256 over each tensor's key, shape and four evenly spaced runs of 16 values as float32,
    in any order of the keys, and reads only a few pages of each tensor of a mapped file. The dtype does not enter, so
    that an exact float32 copy of a bfloat16 model has the same fingerprint. It guards against mistakes, not against
    forgery. `state` may be a dict or an iterable of (key, tensor) pairs.
    """
    pairs = state.items() if isinstance(state, dict) else state
    return fingerprint_of((key, tensor.shape, sample(tensor)) for key, tensor in pairs)


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor that a fingerprint reads: (WINDOWS · WINDOW,), fewer of one that has not WINDOW."""
    flat = tensor.detach().reshape(-1)
    last = max(flat.numel() - WINDOW, 0)
    return torch.cat([flat[start : start + WINDOW] for start in (last * i // (WINDOWS - 1) for i in range(WINDOWS))])


def fingerprint_of(samples: Iterable[tuple[str, torch.Size, torch.Tensor]]) -> str:
    """The fingerprint of a model, from the (key, shape, sample) of each tensor."""
    digests = []
    for key, shape, values in samples:
        content = f"{key}|{tuple(shape)}|".encode() + values.float().cpu().numpy().tobytes()
        digests.append(hashlib.sha256(content).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:32]
