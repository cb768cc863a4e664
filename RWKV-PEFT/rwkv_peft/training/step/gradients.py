"""Gradients of a base model's matrices on some data, which LoRA-GA starts from (Wang et al. 2024, arXiv 2407.05000)."""

from collections.abc import Iterable

import torch
from torch import nn

from .segments import segments_of
from .steps import NEXT_TOKEN, Batch, run


def estimate_gradients(
    model: nn.Module, names: Iterable[str], batch: Batch, length: int = 0
) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss on one batch with respect to the weight of each module in `names`.

    batch is one of TrainBatches, on the CPU, wherever the model is. If length is not 0, only one segment of `length`
    positions is used, the one with the most counted targets. -> {module name: (out, in) tensor}, on the CPU; each
    gradient goes there as soon as it is complete, so only one layer's at a time is beside the activations.
    requires_grad flags are left as found.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    gradients: dict[str, torch.Tensor] = {}
    hooks = []
    for name in names:
        weight = model.get_parameter(f"{name}.weight").requires_grad_(True)

        def keep(parameter: torch.Tensor, name: str = name) -> None:
            assert parameter.grad is not None  # the hook runs once it is accumulated
            gradients[name] = parameter.grad.to("cpu", copy=True)
            parameter.grad = None

        hooks.append(weight.register_post_accumulate_grad_hook(keep))
    with torch.enable_grad():
        segments = segments_of(batch, length or batch["tokens"].shape[1])
        segment = max(segments, key=lambda segment: len(segment.counted)).to(next(model.parameters()).device)
        count = max(1, len(segment.counted))
        head = NEXT_TOKEN.head(segment.targets, segment.counted, count, segment.weights)
        run(model, segment, None, head)[0].backward()
    for hook in hooks:
        hook.remove()
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return gradients
