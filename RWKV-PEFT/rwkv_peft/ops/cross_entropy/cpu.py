"""Calls cpu/cross_entropy, which is built on first use."""

import ctypes

import torch
from torch import Tensor

from ..native.arguments import fields, fill
from ..native.cpu import CpuFamily


class CrossEntropyArguments(ctypes.Structure):
    """The structure of the same name in cpu/cross_entropy/arguments.h."""

    _fields_ = fields("logits targets losses", "rows vocabulary", "scale pull", "gradient bfloat16 threads")


FAMILY = CpuFamily("cross_entropy", (("cross_entropy", None, CrossEntropyArguments),))


def takes(logits: Tensor) -> bool:
    """True if the kernel takes these logits, and can be built here."""
    return FAMILY.takes(logits)


def losses_(logits: Tensor, targets: Tensor, scale: float, pull: float, gradient: bool) -> Tensor:
    """logits (n, V), replaced by scale times their gradient if `gradient`; targets (n,) int64 -> losses (n,) float32.
    Raises IndexError for a target outside the vocabulary."""
    check_range(targets, logits.shape[1])
    losses = torch.empty(logits.shape[0])
    tensors = dict(logits=logits, targets=targets, losses=losses)
    rows, vocabulary = logits.shape
    numbers = dict(rows=rows, vocabulary=vocabulary, scale=scale, pull=pull, gradient=gradient)
    FAMILY.library().cross_entropy(fill(CrossEntropyArguments, logits, tensors, **numbers))
    return losses


def check_range(targets: Tensor, vocabulary: int) -> None:
    """Raise IndexError for a target outside the vocabulary, because the kernel reads the logits there."""
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise IndexError(
            f"targets from {int(targets.min())} to {int(targets.max())} for {vocabulary} logits; a target is a "
            "token of the model's vocabulary: check the tokenizer that made the data"
        )
