"""DeepSpeed's files of a checkpoint, read without running what they hold, and held against the run that reads them.

DeepSpeed unpickles them whole, so that a run's folder from a stranger could execute anything on --resume, and believes
what they say. Here tensors, plain containers and three small classes of its own are read, and of these the tensors and
numbers of steps are taken, each where the run's own engine has one; the rest must be as the engine has it.
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

from ..errors import UserError
from ..files.pth import read_pth, require_file

KNOWN = (LossScaler, ZeroStageEnum, fragment_address)  # which hold numbers and names alone
MODEL_STATES = "model_states.pt"  # how the names of some of the files end; the others hold the optimizer's state
COUNTS = ("global_steps", "global_samples", "skipped_steps")  # of the engine, numbers that grow while a run lasts,
STEP = "step"  # and of an optimizer
# what follows from a run's flags and DeepSpeed's version: it keeps its own, and so it does of an optimizer's group, but
# for the parameters
OWN = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "ds_version")
PARAMETERS = "params"


class TensorsAlone(TorchCheckpointEngine):
    """DeepSpeed's reader and writer for one of its engines, whose reading is read_pth's."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.engine = engine

    def load(self, path: str, map_location: Any = None) -> Any:
        """What the file at `path` holds of what the engine has, on the CPU, whatever map_location says.

        Raises UserError as read_pth does, and where something is missing or of another kind."""
        with torch.serialization.safe_globals(list(KNOWN)):
            found = read_pth(path)
        try:
            taken = matched(found, expected(self.engine, path))
        except Mismatch as error:
            raise UserError(
                f"{path} does not hold the state of this run: {error}; delete {Path(path).parent.parent} to resume "
                "from an older checkpoint, or add --fresh_optimizer to go on without the optimizer's state"
            ) from error
        return copy.deepcopy(taken)  # the file may go while the run lasts, and a mapping would hold it


class Mismatch(ValueError):
    """How the content of a file differs from what is due."""


def expected(engine: Any, path: str) -> dict[str, Any]:
    """What DeepSpeed reads of a file of a checkpoint, as its engine would save it now."""
    if not path.endswith(MODEL_STATES):
        return {"optimizer_state_dict": with_moments(engine.optimizer)}
    numbers = {name: getattr(engine, name) for name in COUNTS}
    world = {"dp_world_size": engine.seq_dp_world_size, "mp_world_size": engine.mp_world_size}
    return {"module": engine.module_state_dict(exclude_frozen_parameters=True), **numbers, **world}


def with_moments(optimizer: Any) -> dict[str, Any]:
    """The state of a ZeRO optimizer with that of Adam below it, which has none before its first step."""
    state = dict(optimizer.state_dict())
    stage_3 = "fp32_flat_groups" in state
    flat = optimizer.fp32_partitioned_groups_flat if stage_3 else optimizer.single_partition_of_fp32_groups
    step = torch.zeros(()) if isinstance(optimizer.optimizer, torch.optim.AdamW) else 0  # of DeepSpeed's own, a number
    adam = {number: {STEP: step, "exp_avg": part, "exp_avg_sq": part} for number, part in enumerate(flat)}
    name = "optimizer_state_dict" if stage_3 else "base_optimizer_state"
    return state | {name: state[name] | {"state": adam}}


def matched(found: Any, due: Any, place: str = "") -> Any:
    """`due` with the tensors and numbers of steps that are `found` at the same places; `place` names this one. Raises
    Mismatch where one is missing or of another kind, or another value differs."""
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
    """`matched` of the entry called `name`."""
    place = f"{place}.{name}" if place else str(name)
    if name not in found:
        raise Mismatch(f"{place} is missing")
    if name not in (*COUNTS, STEP) or isinstance(due, torch.Tensor):
        return matched(found[name], due, place)
    if type(found[name]) is not int or found[name] < 0:
        raise Mismatch(f"{place} is no number of steps")
    return found[name]


def require_like(found: Any, due: torch.Tensor, place: str) -> None:
    """Raise Mismatch unless a value is a tensor in main memory of a tensor's shape and dtype."""
    if not isinstance(found, torch.Tensor):
        raise Mismatch(f"{place} is a {type(found).__name__}, and a tensor is due")
    plain = not found.is_nested and found.layout == torch.strided and found.device.type == "cpu"
    if not plain or (found.shape, found.dtype) != (due.shape, due.dtype):
        kind = f"{found.dtype} {tuple(found.shape)}" if plain else "a tensor of another layout"
        raise Mismatch(f"{place} is {kind}, and {due.dtype} {tuple(due.shape)} is due")


@contextmanager
def tensors_alone(engine: Any) -> Iterator[None]:
    """While it lasts, a DeepSpeed engine reads its files by TensorsAlone, and looks for none: it would take the path of
    a folder for a pattern."""
    before = engine.checkpoint_engine
    engine.checkpoint_engine = TensorsAlone(engine)
    engine._get_all_ckpt_names = lambda folder, tag: [str(require_file(engine._get_ckpt_name(folder, tag)))]
    try:
        yield
    finally:
        engine.checkpoint_engine = before
        del engine._get_all_ckpt_names
