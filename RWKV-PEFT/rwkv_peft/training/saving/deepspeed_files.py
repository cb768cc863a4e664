"""Read the optimizer's state as earlier versions kept it: DeepSpeed's file of each rank, without running code from it.

DeepSpeed unpickles its files whole, so that --resume in a stranger's folder could execute anything. Here only tensors,
plain containers and three small classes of DeepSpeed's are read, and of these only the flat tensors and Adam's state of
them, which must be of the engine's sizes: they fit the number of ranks and the stage that wrote them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ...errors import UserError
from ...files.pth import read_pth, require_file
from .partitions import MOMENTS, STEP, flat_tensors, state_of
from .run_state import DEEPSPEED, MOST, remedy_of

KNOWN = (LossScaler, ZeroStageEnum, fragment_address)  # they hold only numbers and names


class Mismatch(ValueError):
    """The content of a file differs from what the engine expects; the message says how."""


def load_deepspeed(checkpoint: Path, optimizer: Any, rank: int, ranks: int) -> int:
    """Copy what this rank of `ranks` had saved into the flat tensors of a ZeRO optimizer -> how many steps Adam had
    taken. Raises UserError as read_pth does, and for a file that does not hold them."""
    file = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    names = [path.name for path in (checkpoint / DEEPSPEED).iterdir() if path.name.removeprefix("bf16_") == file]
    path = require_file(checkpoint / DEEPSPEED / (names or [file])[0])
    with torch.serialization.safe_globals(list(KNOWN)):
        found = read_pth(path)
    try:
        return copy_states(entry(found, "optimizer_state_dict"), optimizer, ranks)
    except Mismatch as error:
        raise UserError(f"{path} does not hold the state of this run: {error}; {remedy_of(checkpoint)}") from error


@torch.no_grad()
def copy_states(found: Any, optimizer: Any, ranks: int) -> int:
    """Copy the state dict of a ZeRO optimizer, of any stage, into the flat tensors of one -> Adam's count of steps."""
    stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    masters = "fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"
    saved, adam = entry(found, masters), entry(found, "optimizer_state_dict" if stage_3 else "base_optimizer_state")
    adam, steps, flats = entry(adam, "state"), 0, flat_tensors(optimizer)
    if not isinstance(saved, list) or len(saved) != len(flats):
        raise Mismatch(f"{masters} is no list of {len(flats)}")
    for number, (flat, tensor) in enumerate(zip(flats, saved)):
        copy_flat(flat.data, tensor, masters, ranks)
        state = entry(adam, number)
        for kind in MOMENTS:
            copy_flat(state_of(optimizer, flat)[kind], entry(state, kind), kind, ranks)
        steps = count_of(entry(state, STEP))
    return steps


def count_of(step: Any) -> int:
    """Adam's count of steps, which is a number or a tensor of one."""
    number = step.item() if is_plain(step) and step.dim() == 0 else step
    if type(number) not in (int, float) or not 0 <= number < MOST:
        raise Mismatch(f"{STEP} is no number of steps")
    return int(number)


def is_plain(value: Any) -> bool:
    """Tell whether a value is a tensor on the CPU, of the usual layout."""
    kind = isinstance(value, torch.Tensor) and not value.is_nested and value.layout == torch.strided
    return kind and value.device.type == "cpu"


def copy_flat(flat: torch.Tensor, saved: Any, name: str, ranks: int) -> None:
    """Copy a saved flat tensor, which may lack the elements of padding at its end, fewer than two for each rank."""
    if not is_plain(saved) or saved.dim() != 1 or saved.dtype != flat.dtype:
        raise Mismatch(f"{name} is no flat tensor of {flat.dtype}")
    if not 0 <= len(flat) - len(saved) < 2 * ranks:
        raise Mismatch(f"{name} has {len(saved):,} elements, and {len(flat):,} are due")
    flat[: len(saved)] = saved.to(flat.device)


def entry(found: Any, name: Any) -> Any:
    """The entry of a mapping that is called `name`."""
    if not isinstance(found, Mapping) or name not in found:
        raise Mismatch(f"{name} is missing")
    return found[name]
