"""Read DeepSpeed's files of a checkpoint without running code from them, and check them against the resuming run.

DeepSpeed unpickles them whole, so that --resume in a stranger's folder could execute anything, and it trusts their
values. Here only tensors, plain containers and three small classes of DeepSpeed's are read. Tensors and step counts are
taken from the file if the run's own engine has them, settings stay the engine's (OWN), and all other values must equal
the engine's.
"""

import copy
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ...errors import UserError
from ...files.pth import read_pth, require_file

KNOWN = (LossScaler, ZeroStageEnum, fragment_address)  # they hold only numbers and names
MODEL_STATES = "model_states.pt"  # the names of files with the engine's state end so; the others hold the optimizer's
COUNTS = ("global_steps", "global_samples", "skipped_steps")  # the engine's counts, which grow during a run
STEP = "step"  # an optimizer's count
# entries that follow from the flags and DeepSpeed's version: the run keeps its own, and its own of each entry of an
# optimizer's group except the parameters
OWN = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "ds_version")
PARAMETERS = "params"


class TensorsAlone(TorchCheckpointEngine):
    """DeepSpeed's reader and writer of checkpoints for one of its engines, with reading by read_pth."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.engine = engine

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read those entries of the file at `path` that the engine has, on the CPU, whatever map_location says.

        Raises UserError as read_pth does, and if an entry is missing or of another kind.
        """
        with torch.serialization.safe_globals(list(KNOWN)):
            found = read_pth(path)
        try:
            taken = matched(found, expected(self.engine, path))
        except Mismatch as error:
            raise UserError(
                f"{path} does not hold the state of this run: {error}; delete {Path(path).parent.parent} to resume "
                "from an older checkpoint, or add --fresh_optimizer to go on without the optimizer's state"
            ) from error
        return copy.deepcopy(taken)  # the file may be deleted during the run, and a mapping would hold it


class Mismatch(ValueError):
    """The content of a file differs from what the engine expects; the message says how."""


def expected(engine: Any, path: str) -> dict[str, Any]:
    """The entries that DeepSpeed reads from a file of a checkpoint, with the values that its engine would save now."""
    if not path.endswith(MODEL_STATES):
        return {"optimizer_state_dict": with_moments(engine.optimizer)}
    numbers = {name: getattr(engine, name) for name in COUNTS}
    world = {"dp_world_size": engine.seq_dp_world_size, "mp_world_size": engine.mp_world_size}
    return {"module": engine.module_state_dict(exclude_frozen_parameters=True), **numbers, **world}


def with_moments(optimizer: Any) -> dict[str, Any]:
    """The state of a ZeRO optimizer with the state of the Adam inside it, which has none before its first step."""
    state = dict(optimizer.state_dict())
    stage_3 = "fp32_flat_groups" in state
    flat = optimizer.fp32_partitioned_groups_flat if stage_3 else optimizer.single_partition_of_fp32_groups
    step = torch.zeros(()) if isinstance(optimizer.optimizer, torch.optim.AdamW) else 0  # DeepSpeed's own: a number
    adam = {number: {STEP: step, "exp_avg": part, "exp_avg_sq": part} for number, part in enumerate(flat)}
    name = "optimizer_state_dict" if stage_3 else "base_optimizer_state"
    return state | {name: state[name] | {"state": adam}}


def matched(found: Any, due: Any, place: str = "") -> Any:
    """Return `due` with the tensors and step counts that are `found` at the same places; `place` names this one. Raises
    Mismatch if one is missing or of another kind, or if another value differs."""
    if isinstance(due, torch.Tensor):
        require_like(found, due, place)
        return found
    if isinstance(due, Mapping):
        if not isinstance(found, Mapping):
            raise Mismatch(f"{place or 'it'} is a {type(found).__name__}")
        own = OWN if PARAMETERS not in due else due.keys() - {PARAMETERS}
        return {name: due[name] if name in own else matched_in(found, name, due[name], place) for name in due}
    if isinstance(due, list):
        if not isinstance(found, list) or len(found) != len(due):
            raise Mismatch(f"{place} is no list of {len(due)}")
        return [matched(item, its, f"{place}[{number}]") for number, (item, its) in enumerate(zip(found, due))]
    if isinstance(due, fragment_address):
        found, due_values = (vars(value) if isinstance(value, fragment_address) else value for value in (found, due))
        matched(found, due_values, place)
    elif type(found) is not type(due) or found != due:
        raise Mismatch(f"{place} is {reprlib.repr(found)}, and {due!r} is due")
    return due


def matched_in(found: Mapping[Any, Any], name: Any, due: Any, place: str) -> Any:
    """Apply `matched` to the entry called `name`; a step count need only be an integer of at least 0."""
    place = f"{place}.{name}" if place else str(name)
    if name not in found:
        raise Mismatch(f"{place} is missing")
    if name not in (*COUNTS, STEP) or isinstance(due, torch.Tensor):
        return matched(found[name], due, place)
    if type(found[name]) is not int or found[name] < 0:
        raise Mismatch(f"{place} is no number of steps")
    return found[name]


def require_like(found: Any, due: torch.Tensor, place: str) -> None:
    """Raise Mismatch unless `found` is a plain tensor on the CPU with the shape and dtype of `due`."""
    if not isinstance(found, torch.Tensor):
        raise Mismatch(f"{place} is a {type(found).__name__}, and a tensor is due")
    plain = not found.is_nested and found.layout == torch.strided and found.device.type == "cpu"
    if not plain or (found.shape, found.dtype) != (due.shape, due.dtype):
        kind = f"{found.dtype} {tuple(found.shape)}" if plain else "a tensor of another layout"
        raise Mismatch(f"{place} is {kind}, and {due.dtype} {tuple(due.shape)} is due")


@contextmanager
def tensors_alone(engine: Any) -> Iterator[None]:
    """Let a DeepSpeed engine read its files by TensorsAlone, and give it their names: its own search would take the
    path of a folder for a pattern."""
    before = engine.checkpoint_engine
    engine.checkpoint_engine = TensorsAlone(engine)
    engine._get_all_ckpt_names = lambda folder, tag: [str(require_file(engine._get_ckpt_name(folder, tag)))]
    try:
        yield
    finally:
        engine.checkpoint_engine = before
        del engine._get_all_ckpt_names
