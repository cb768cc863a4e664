"""Find the pieces of the optimizer's state that a rank holds under ZeRO, by parameter.

ZeRO lays parameters one behind the other into flat tensors and gives each rank a part of every one: a part of all of
them together in stages 1 and 2, a part of each parameter in stage 3. What is kept by parameter fits any of these, and
so any number of ranks.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..optimizers.choice import Averaging, Further

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")  # the float32 weight, and Adam's two moments of it
KINDS = (MASTER, *MOMENTS)
STEP = "step"  # Adam's count of steps


class Piece(NamedTuple):
    """The elements from `start` on of a flattened parameter: {kind: float32 (n,)}, views of the optimizer's."""

    name: str
    size: int
    start: int
    tensors: Mapping[str, torch.Tensor]


def flat_tensors(optimizer: Any) -> list[torch.Tensor]:
    """The flat float32 weights of a ZeRO optimizer that this rank updates."""
    stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    return list(optimizer.fp32_partitioned_groups_flat if stage_3 else optimizer.single_partition_of_fp32_groups)


def state_of(optimizer: Any, flat: torch.Tensor) -> dict[str, Any]:
    """The optimizer's state of a flat tensor; before the first step it is made here, as the optimizer would."""
    inner = optimizer.optimizer
    state = inner.state[flat]
    if not state and isinstance(inner, Further):
        inner.begin(flat)
    elif not state:
        counts_in_tensors = isinstance(inner, torch.optim.AdamW)  # DeepSpeed's own counts in numbers
        state[STEP] = torch.zeros((), device=flat.device) if counts_in_tensors else 0
        state |= {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
    return state


def pieces_of(optimizer: Any, parameters: Iterable[tuple[str, Any]]) -> Iterator[Piece]:
    """The pieces that this rank holds of the parameters that train, of all given by name."""
    flats = flat_tensors(optimizer)
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        size, start, number, place, length = _place(optimizer, parameter)
        if length > 0:
            flat = flats[number]
            whole = {MASTER: flat.data} | (moments_of(optimizer, flat) if is_by_parameter(optimizer) else {})
            views = {kind: tensor.narrow(0, place, length) for kind, tensor in whole.items()}
            yield Piece(name, size, start, views)


def is_by_parameter(optimizer: Any) -> bool:
    """Tell whether the optimizer's state is numbers of each parameter's own, which go into pieces."""
    return not isinstance(optimizer.optimizer, Further) or optimizer.optimizer.by_parameter


def moments_of(optimizer: Any, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of the optimizer's state that have a number for each of a flat tensor's."""
    state = state_of(optimizer, flat)
    return {kind: found for kind, found in state.items() if isinstance(found, torch.Tensor) and found.dim() == 1}


def codes_of(optimizer: Any) -> dict[str, torch.Tensor]:
    """This rank's state that is not by parameter: {NUMBER:NAME: tensor}, of the NUMBERth flat tensor."""
    if is_by_parameter(optimizer):
        return {}
    states = enumerate(state_of(optimizer, flat) for flat in flat_tensors(optimizer))
    found = {f"{number}:{name}": value for number, state in states for name, value in state.items()}
    tables = ("qmap1", "qmap2")  # of the codes, the same for all
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, torch.Tensor) and name.partition(":")[2] not in tables
    }


def _place(optimizer: Any, parameter: Any) -> tuple[int, int, int, int, int]:
    """(elements of a parameter, the first that this rank holds, its flat tensor's number, the place there, length)."""
    if hasattr(parameter, "ds_numel"):  # stage 3: each rank has as many, and what is beyond the parameter's end is none
        number, place, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = dist.get_rank(optimizer.dp_process_group) * length
        return parameter.ds_numel, start, number, place, min(length, parameter.ds_numel - start)
    found = parameter._hp_mapping
    if found is None:
        return parameter.numel(), 0, 0, 0, 0
    inner, outer = found.lp_fragment_address, found.hp_fragment_address
    return parameter.numel(), inner.start, found.param_group_index, outer.start, outer.numel


def steps_taken(optimizer: Any) -> int:
    """Return the number of steps that the optimizer has taken, 0 if it does not count them."""
    if isinstance(optimizer.optimizer, Averaging):
        return optimizer.optimizer.param_groups[0]["k"]
    return max((int(state_of(optimizer, flat).get(STEP, 0)) for flat in flat_tensors(optimizer)), default=0)


@torch.no_grad()
def take_up(optimizer: Any, steps: int) -> None:
    """Let a ZeRO optimizer go on after `steps` steps, and give the model its weights. All ranks call it at once."""
    for flat in flat_tensors(optimizer):
        state = state_of(optimizer, flat)
        if STEP in state:
            state[STEP] = torch.full_like(state[STEP], steps) if isinstance(state[STEP], torch.Tensor) else steps
    publish(optimizer)


def publish(optimizer: Any) -> None:
    """Give the model the weights of a ZeRO optimizer. Every rank calls it at once."""
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()
    for number in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
    optimizer.checkpoint_event_epilogue()


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
