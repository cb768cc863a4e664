"""Whether a run begins or goes on, by what its folder holds and --resume; and the folder itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cli import counted
from ..config import AdapterConfig, TrainConfig
from ..errors import UserError
from ..names import ADAPTER, METRICS, MODEL
from .checkpoints import CHECKPOINTS, TRAINED, UNSAVED, find_checkpoint
from .history import Lowest, history
from .identity import read_run_state
from .plan import Plan
from .products import newest_name

MUST, AUTO = "must", "auto"  # --resume by itself, and --resume auto


def find_state(
    folder: Path, train: TrainConfig, identity: Mapping[str, Any]
) -> tuple[Path | None, dict[str, Any] | None]:
    """(checkpoint folder, its state.json) to resume from, or (None, None) for a fresh run. A run that ended before its
    first checkpoint left nothing to go on from and nothing to lose, so that it starts anew: with --resume or without
    where it had written no trained tensors yet, else with --resume auto."""
    checkpoint = find_checkpoint(folder)
    if checkpoint is not None and train.resume:
        return checkpoint, read_run_state(checkpoint, identity, train.fresh_optimizer)
    if checkpoint is not None:
        raise UserError(f"--proj_dir {folder} already holds a run; add --resume to continue it, or name another folder")
    leftover = find_trained(folder, newest_name(AdapterConfig(**identity["adapter"])))
    unsaved = (folder / UNSAVED).exists()
    if leftover and not (unsaved and train.resume == AUTO):
        remedy = f"move {folder / leftover} away" + " and leave --resume out to start anew" * (train.resume == MUST)
        if unsaved:
            remedy = "--resume auto clears what that run left"
        raise UserError(
            f"--proj_dir {folder} already holds {leftover}, which a new run would overwrite, and no complete "
            f"checkpoint to --resume from; {remedy}, or name another folder"
        )
    if train.resume == MUST and not (folder / METRICS).exists():
        raise UserError(
            f"--resume: there is no complete checkpoint under {folder / CHECKPOINTS}; leave --resume out to start, "
            "write --resume auto to start or go on, or give the --proj_dir of the run"
        )
    return None, None


def validated_from(plan: Plan, state: Mapping[str, Any] | None, validation: str) -> int:
    """The sample behind which the validations of a run are on the data that `validation` is a hash of; state is that of
    the checkpoint that its Plan goes on from, or None."""
    if state is None or state.get("validation", validation) != validation:  # earlier versions did not record it
        return plan.first_sample
    return state["validated_from"]


def lowest_before(train: TrainConfig, plan: Plan, since: int) -> Lowest:
    """The Lowest of the validations before those of a Plan and behind the sample `since`."""
    return Lowest(history(Path(train.proj_dir) / METRICS, plan, since))


def other_retained(state: Mapping[str, Any] | None, retained: str) -> list[str]:
    """A note where what is retained is measured on other data than before a run went on, by the hash of it that state
    has and that of now, "" for none."""
    before = "" if state is None else state.get("retained", "")  # earlier versions did not record it
    if not before or retained in ("", before):
        return []
    return [
        "note: --retain_data is not what it was before; retain_start and each retain_loss so far are of other samples"
    ]


def completed(train: TrainConfig, plan: Plan, lowest: Lowest) -> tuple[str, str]:
    """(how the run that is resumed had come to its end by its checkpoint, what has it go on), ("", "") where it had
    not."""
    steps = counted(plan.first_step, "step")
    if plan.first_step >= plan.total_steps:
        return f"the run in {train.proj_dir} is complete ({steps})", "raise --epoch_count"
    if lowest.exhausts(train.early_stop):
        steps += f", the last {counted(train.early_stop, 'validation')} without a lower loss"
        return f"the run in {train.proj_dir} is complete ({steps})", "raise --early_stop, or leave it out,"
    return "", ""


def find_trained(folder: Path, newest: str) -> str | None:
    """The name of a file of trained tensors that a new run would overwrite: the newest of its kind, or any in the
    folder of a run; None where there is none."""
    if (folder / newest).exists():
        return newest
    files = [file.name for name in (ADAPTER, MODEL) for file in folder.glob(name.replace(".", "*."))]
    written = [name for name in files if TRAINED.fullmatch(name)]  # a model to start from may lie there
    return min(written) if written and (folder / METRICS).exists() else None
