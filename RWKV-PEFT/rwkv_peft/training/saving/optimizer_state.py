"""The optimizer's state by parameter, so that a run may go on on other ranks, stages and devices.

ZeRO lays parameters one behind the other into flat tensors and gives each rank a part of every one: a part of all of
them together in stages 1 and 2, a part of each parameter in stage 3. A state that is kept by parameter fits any of
these, and so any number of ranks.

optimizer/rank-NNNNN.safetensors holds the pieces of one rank, float32 (n,), each called KIND:START:PARAMETER: KIND is
master or the name of a moment, as exp_avg, and START the piece's first element in the flattened parameter. The header
counts the optimizer's steps. No rank waits for another, and a rank that reads takes its own pieces from the files of
all.

An optimizer with other state than by parameter adds codes:RANK:NUMBER:NAME, of the NUMBERth flat tensor, for that rank.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ...checkpoints.atomic import fsync
from ...checkpoints.readable import reading
from ...checkpoints.tensors import TensorSpec, read_safetensors, write_safetensors
from ...cli.errors import UserError
from .checkpoints import OPTIMIZER, remedy_of

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")  # the float32 weight, and Adam's two moments of it
KINDS = (MASTER, *MOMENTS)
STEP = "step"  # Adam's count of steps
METADATA_KEY, FORMAT_VERSION = "rwkv_peft_optimizer", 1
STEPS, SCALE = "steps", "loss_scale"  # entries in the metadata
CODES = "codes"
NO_CODES: Mapping[str, torch.Tensor] = MappingProxyType({})
NO_SCALE: Mapping[str, float] = MappingProxyType({})


class Fragment(NamedTuple):
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
    if not state and hasattr(inner, "begin"):
        inner.begin(flat)
    elif not state:
        counts_in_tensors = isinstance(inner, torch.optim.AdamW)  # DeepSpeed's own counts in numbers
        state[STEP] = torch.zeros((), device=flat.device) if counts_in_tensors else 0
        state |= {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
    return state


def pieces_of(optimizer: Any, parameters: Iterable[tuple[str, Any]]) -> Iterator[Fragment]:
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
            yield Fragment(name, size, start, views)


def is_by_parameter(optimizer: Any) -> bool:
    """True if the optimizer's state has a number for each of a parameter's, so that it goes into pieces."""
    return getattr(optimizer.optimizer, "by_parameter", True)


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
    if hasattr(parameter, "ds_numel"):  # stage 3: each rank has as many, padded beyond the parameter's end
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


def write_pieces(
    checkpoint: Path,
    rank: int,
    pieces: Iterable[Fragment],
    steps: int,
    codes: Mapping[str, torch.Tensor] = NO_CODES,
    scale: Mapping[str, float] = NO_SCALE,
) -> None:
    """Write a rank's pieces, its codes and the loss scale's counters into a checkpoint, a tensor at a time."""
    tensors = {f"{kind}:{piece.start}:{piece.name}": part for piece in pieces for kind, part in piece.tensors.items()}
    tensors |= {f"{CODES}:{rank}:{name}": tensor for name, tensor in codes.items()}
    header = {"format_version": FORMAT_VERSION, STEPS: steps} | ({SCALE: dict(scale)} if scale else {})
    path = checkpoint / OPTIMIZER / f"rank-{rank:05d}.safetensors"
    path.parent.mkdir(exist_ok=True)
    specs = {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}
    write_safetensors(path, specs, tensors.items(), {"format": "pt", METADATA_KEY: json.dumps(header)})
    fsync(path)  # by the machine that wrote it


class SavedOptimizer:
    """The optimizer's state in a checkpoint, of all ranks; its count of steps; the counters of the loss scale."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint, self.steps = checkpoint, 0
        self.scale: dict[str, float] = {}
        self.found: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = defaultdict(list)
        self.codes: dict[tuple[int, str], torch.Tensor] = {}
        for path in sorted((checkpoint / OPTIMIZER).glob("rank-*.safetensors")):
            tensors, metadata = read_safetensors(path, weights=False)
            with reading(path, "does not hold the optimizer's state of this run", remedy_of(checkpoint)):
                header = json.loads(metadata[METADATA_KEY])
                if header["format_version"] > FORMAT_VERSION:
                    raise ValueError(f"its format is {header['format_version']}, and {FORMAT_VERSION} is read here")
                self.steps, self.scale = header[STEPS], header.get(SCALE, {})
                for key, tensor in tensors.items():
                    kind, start, name = key.split(":", 2)
                    if kind == CODES:
                        self.codes[int(start), name] = tensor
                    else:
                        self.found[kind, name].append((int(start), tensor))

    @torch.no_grad()
    def fill_codes(self, rank: int, codes: Mapping[str, torch.Tensor]) -> None:
        """Copy a rank's codes into its tensors. Raises UserError if some are missing."""
        for name, into in codes.items():
            saved = self.codes.get((rank, name))
            if saved is None or (saved.shape, saved.dtype) != (into.shape, into.dtype):
                raise self.mismatch(f"{CODES}:{rank}:{name} is no {into.dtype} of shape {tuple(into.shape)}")
            into.copy_(saved)

    @torch.no_grad()
    def fill(self, piece: Fragment) -> None:
        """Copy the values of a piece into its tensors. Raises UserError if some are missing."""
        for kind, into in piece.tensors.items():
            done, due = piece.start, piece.start + len(into)
            for start, tensor in sorted(self.found.get((kind, piece.name), ()), key=lambda part: part[0]):
                end = min(start + len(tensor), due)
                if start <= done < end:
                    into[done - piece.start : end - piece.start] = tensor[done - start : end - start].to(into.device)
                    done = end
            if done != due:
                raise self.mismatch(f"{kind} of {piece.name} lacks element {done:,}")

    def mismatch(self, reason: str) -> UserError:
        """The error that the folder lacks a part of the state."""
        return UserError(
            f"{self.checkpoint / OPTIMIZER} does not hold the optimizer's state of this run: {reason}; "
            + remedy_of(self.checkpoint)
        )
