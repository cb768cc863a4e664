"""DeepSpeed's ZeRO: the loss scale of --precision fp16, the norm of gradients, gathering, and sums of gradients.

DeepSpeed halves the loss scale, and skips the step, if gradients overflow, and doubles it later. For a norm it converts
each gradient to float64, which on a CPU takes longer than the optimizer's step; here float32 adds up the squares of
only SHORT numbers at a time, and float64 adds up these sums.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Function

from ...config import TrainConfig
from ...models.parts import LanguageModel

KEPT = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # its counters, which a resumed run takes up
SHORT = 4096  # numbers whose squares are added up in float32
NOT_FINITE = -1.0  # DeepSpeed's value for a norm that is infinite or NaN
MANY = 256  # gradients: from about here on, one more hardly changes a sum of bfloat16, whose significand has 8 bits


def dynamic_scaler(optimizer: Any) -> Any:
    """The loss scaler of a ZeRO optimizer, None unless it changes the scale."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def skipped(optimizer: Any) -> bool:
    """True if a ZeRO optimizer has just skipped a step, because gradients overflowed, and can lower the scale."""
    scaler = dynamic_scaler(optimizer)
    return scaler is not None and optimizer.overflow and scaler.cur_scale > scaler.min_scale


def counters_of(optimizer: Any) -> dict[str, float]:
    """The loss scaler's counters, {} if there are none."""
    scaler = dynamic_scaler(optimizer)
    return {} if scaler is None else {name: getattr(scaler, name) for name in KEPT}


def go_on_with(optimizer: Any, counters: Mapping[str, float]) -> None:
    """Set the loss scaler's counters to a checkpoint's."""
    for name in counters_of(optimizer).keys() & counters.keys():
        setattr(optimizer.loss_scaler, name, counters[name])


def square_sum(x: Tensor) -> Tensor:
    """Sum the squares of x (any shape, bfloat16 or float32), to float32's rounding -> float64 ().

    It is infinite if the squares of SHORT numbers exceed float32's range, that is if their root exceeds 1.8e19.
    """
    flat = x.detach().reshape(-1)
    whole = flat.numel() // SHORT * SHORT
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, SHORT), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)
    return norms.double().square().sum() + rest.double().square()


def gradient_norm(optimizer: Any, gradients: Iterable[Tensor]) -> Tensor:
    """This rank's parts of the gradients of a DeepSpeedZeroOptimizer -> their norm over all ranks: float32 (),
    NOT_FINITE if it is not finite. Parts are padded with zeros, which add nothing."""
    total = torch.zeros((), dtype=torch.float64, device=optimizer.device)
    for gradient in gradients:
        total += square_sum(gradient)
    distributed.all_reduce(total, group=optimizer.dp_process_group)
    norm = total.sqrt().float()
    return torch.where(norm.isfinite(), norm, torch.full_like(norm, NOT_FINITE))


def live_parameters(model: LanguageModel) -> int:
    """The number of parameters that may be gathered at a time: two blocks' (one computes, the next is prefetched), or
    the embedding's or the head's if these are larger.

    DeepSpeed's default, a billion, would leave most of a 1.6B model gathered.
    """
    blocks = sorted(map(_size, model.blocks))
    return max(sum(blocks[-2:]), _size(model.emb), _size(model.head))


def recompute_whole_blocks(model: LanguageModel) -> None:
    """Let --grad_cp recompute a block at the beginning of its backward, before the engine adds hooks of its own.

    ZeRO-3 keeps the weights that a recomputation gathers until the module that is in backward then is done. If the
    first layer's saved tensors started the recomputation, it would leave that very layer, and the engine would free
    its weight too early.
    """
    for block in model.blocks:
        block.register_forward_hook(_recomputed_first)


def _recomputed_first(block: nn.Module, inputs: object, outputs: Any) -> Any:
    *tensors, state = outputs
    results = _RecomputeFirst.apply(*tensors, *state)
    return *results[: len(tensors)], type(state)(*results[len(tensors) :])


class _RecomputeFirst(Function):
    """Identity; backward first reads a saved tensor, for which a checkpoint recomputes all."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(tensors[0].new_empty(0))
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # reading it recomputes the block
        return gradients


def sums_apart(train: TrainConfig) -> bool:
    """True if gradients of micro batches add up in float32, in a buffer of the engine, and not in bfloat16."""
    return train.stage == 2 and train.precision == "bf16" and train.accumulate_grad_batches > 1


def loses_in_sums(train: TrainConfig) -> bool:
    """True if so many gradients add up in bfloat16 that the last of them hardly count.

    With 1,024 similar ones the sum was 10 % off, and the norm 8 % too small; with 256, 2 %, and 1 % in float32.
    """
    in_bfloat16 = train.precision == "bf16" and not train.offload and not sums_apart(train)
    return in_bfloat16 and train.accumulate_grad_batches >= MANY


def exchanges_gradients(train: TrainConfig) -> bool:
    """True if gradients go through the engine's buckets. A single rank without ZeRO-3, offload or float32 sums needs
    none: the optimizer takes gradients from where backward left them."""
    return train.ranks > 1 or train.stage == 3 or train.offload or sums_apart(train)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
