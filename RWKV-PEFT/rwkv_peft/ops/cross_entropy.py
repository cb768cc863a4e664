"""Cross-entropy of given logits together with its gradient, which overwrites the logits: plain torch for any device and
dtype, kernels for bfloat16, and for float32 on CPUs, if they can be built. On a GPU a block of threads takes a row of
logits.
"""

import ctypes
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .native.calls import fields, fill
from .native.cpu import CpuFamily
from .native.cuda import CudaFamily


class CpuArguments(ctypes.Structure):
    """CrossEntropyArguments in cpu/cross_entropy/arguments.h."""

    _fields_ = fields("logits targets losses", "rows vocabulary", "scale pull", "gradient bfloat16 threads")


class CudaArguments(ctypes.Structure):
    """CrossEntropyArguments in cuda/cross_entropy/arguments.cuh."""

    _fields_ = fields("logits gradient targets losses", "vocabulary", "scale pull", "")


CPU = CpuFamily("cross_entropy", (("cross_entropy", None, CpuArguments),))
CUDA = CudaFamily("cross_entropy", ("cross_entropy",), CudaArguments)
Losses = Callable[[Tensor, Tensor, float, float, bool], Tensor]


def cross_entropy_(
    logits: Tensor, targets: Tensor, scale: float | Tensor, pull: float = 0.0, gradient: bool = True, each: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The losses of some tokens, scaled and added up, and the gradient of that sum.

    logits (n, V), which are overwritten; targets (n,) int64; scale: a number or a 0-dim tensor; pull adds
    pull · (largest logit) to the unscaled gradient of each row's largest logit. -> (scale · Σ losses, in float32, or in
    float64 for float64 logits, or with `each` the losses (n,) themselves; the gradient (n, V) in the logits' dtype, or
    None without `gradient`).
    """
    kernel = backend(logits)
    if kernel is not None:
        losses = kernel(logits, targets.contiguous(), float(scale), pull, gradient)
        return losses if each else losses.sum() * scale, logits if gradient else None
    dtype = logits.dtype
    logits = logits.to(torch.float64 if dtype == torch.float64 else torch.float32)
    picked = targets[:, None]
    largest, where = logits.max(dim=1, keepdim=True)
    logits.sub_(largest)
    true_logit = logits.gather(1, picked)
    log_sum = logits.exp().sum(dim=1, keepdim=True).log()
    losses = (log_sum - true_logit)[:, 0]
    loss = losses if each else losses.sum() * scale
    if not gradient:
        return loss, None
    grad = logits.sub_(log_sum).exp_()  # the softmax, in the logits' own memory
    grad.scatter_add_(1, picked, torch.full_like(largest, -1.0))
    grad.scatter_add_(1, where, largest * pull)
    return loss, grad.mul_(scale).to(dtype)


def backend(logits: Tensor) -> Losses | None:
    """The kernel for the logits (cpu_losses_ or cuda_losses_), or None for plain torch: the one place that decides."""
    if not logits.is_contiguous():
        return None
    if logits.is_cpu:
        return cpu_losses_ if CPU.takes(logits) else None
    # the kernel reads 16 bytes of logits at once
    return cuda_losses_ if CUDA.takes(logits) and (logits.is_meta or logits.data_ptr() % 16 == 0) else None


def cpu_losses_(logits: Tensor, targets: Tensor, scale: float, pull: float, gradient: bool) -> Tensor:
    """logits (n, V), replaced by scale times their gradient if `gradient`; targets (n,) int64 -> losses (n,) float32.
    Raises IndexError for a target outside the vocabulary, at which the kernel would read other memory."""
    rows, vocabulary = logits.shape
    if rows and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise IndexError(
            f"targets from {int(targets.min())} to {int(targets.max())} for {vocabulary} logits; a target is a "
            "token of the model's vocabulary: check the tokenizer that made the data"
        )
    losses = torch.empty(rows)
    tensors = dict(logits=logits, targets=targets, losses=losses)
    numbers = dict(rows=rows, vocabulary=vocabulary, scale=scale, pull=pull, gradient=gradient)
    CPU.library().cross_entropy(fill(CpuArguments, logits, tensors, **numbers))
    return losses


def cuda_losses_(logits: Tensor, targets: Tensor, scale: float, pull: float, gradient: bool) -> Tensor:
    """As cpu_losses_; a target outside the vocabulary gives NaN, because an error would have to wait for the GPU."""
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    tensors = dict(logits=logits, gradient=logits if gradient else None, targets=targets, losses=losses)
    call(logits, tensors, vocabulary=logits.shape[1], scale=scale, pull=pull)
    return losses


def call(logits: Tensor, tensors: Mapping[str, Tensor | None], **numbers: float) -> None:
    """Enqueue the kernel on the GPU of the logits; tensors (None: not given) and numbers by the names of
    CudaArguments."""
    CUDA.run("cross_entropy", logits, {**tensors, **numbers}, logits.shape[0])
