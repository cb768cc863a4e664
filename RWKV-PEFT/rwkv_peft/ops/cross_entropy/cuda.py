"""Calls cuda/cross_entropy: one kernel, a block for each row of logits."""

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from ..native.arguments import fields
from ..native.cuda import DTYPES, CudaFamily

KERNELS = tuple(f"cross_entropy_{dtype}" for dtype in DTYPES.values())


class CrossEntropyArguments(ctypes.Structure):
    """The structure of the same name in cuda/cross_entropy/arguments.cuh."""

    _fields_ = fields("logits gradient targets losses", "vocabulary", "scale pull", "")


def takes(logits: Tensor) -> bool:
    """True if the kernel takes these logits: it reads 16 bytes of them at once."""
    return FAMILY.takes(logits) and (logits.is_meta or logits.data_ptr() % 16 == 0)


def losses_(logits: Tensor, targets: Tensor, scale: float, pull: float, gradient: bool) -> Tensor:
    """logits (n, V), replaced by scale times their gradient if `gradient`; targets (n,) int64 -> losses (n,) float32.
    A target outside the vocabulary gives NaN, because an error would have to wait for the GPU."""
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    tensors = dict(logits=logits, gradient=logits if gradient else None, targets=targets, losses=losses)
    call(logits, tensors, vocabulary=logits.shape[1], scale=scale, pull=pull)
    return losses


def call(logits: Tensor, tensors: Mapping[str, Tensor | None], **numbers: float) -> None:
    """Enqueue the kernel on the GPU of the logits; tensors (None: not given) and numbers by the names of
    CrossEntropyArguments."""
    given, blocks = {**tensors, **numbers}, logits.shape[0]
    FAMILY.run(f"cross_entropy_{DTYPES[logits.dtype]}", logits, given, blocks)


FAMILY = CudaFamily("cross_entropy", KERNELS, CrossEntropyArguments)
