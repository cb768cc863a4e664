"""Decide whether a run begins or goes on, by --resume and what its folder holds."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...cli.errors import UserError
from ...cli.names import ADAPTER, METRICS, MODEL
from ...cli.parser import counted
from ...config import AdapterConfig, DataConfig, TrainConfig
from ..step.plan import Plan
from .checkpoints import CHECKPOINTS, TRAINED, UNSAVED, find_checkpoint, saved_state
from .history import Lowest
from .identity import read_run_state
from .products import newest_name

MUST, AUTO = "must", "auto"  # --resume by itself, and --resume auto


def find_state(
    folder: Path, train: TrainConfig, identity: Mapping[str, Any]
) -> tuple[Path | None, dict[str, Any] | None]:
    """Return (checkpoint folder, its state.json) to resume from, or (None, None) for a fresh run. A run that ended
    before its first checkpoint left nothing to resume and nothing to lose, so it starts anew: with or without --resume
    if it had written no trained tensors yet, else only with --resume auto. Raises UserError if --resume and the folder
    contradict each other."""
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
            remedy = "--resume auto removes that run's files"
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


def with_kept_order(data: DataConfig, train: TrainConfig) -> DataConfig:
    """Return the DataConfig with the order of rows that a run which goes on began with, whatever batches it has now."""
    before = saved_state(train.proj_dir, train.resume).get("data", {})
    return replace(data, bucketed=before["rows_share_batches"]) if "rows_share_batches" in before else data


def validated_from(plan: Plan, state: Mapping[str, Any] | None, validation: str) -> int:
    """The sample after which a run's validations are on the data with the hash `validation`; state is the state.json of
    the checkpoint that the Plan goes on from, or None."""
    return plan.first_sample if state is None or state["validation"] != validation else state["validated_from"]


def other_retained(state: Mapping[str, Any] | None, retained: str) -> list[str]:
    """Return a note, as a list, if a run that goes on measures --retain_data on other data than before: its hash in
    `state` differs from `retained`, and neither is "" (no data)."""
    before = "" if state is None else state["retained"]
    if not before or retained in ("", before):
        return []
    return ["note: --retain_data is another than before; retain_start and each retain_loss so far are of other samples"]


def completed(train: TrainConfig, plan: Plan, lowest: Lowest) -> tuple[str, str]:
    """Return (how the resumed run had ended by its checkpoint, what makes it go on), ("", "") if it had not ended."""
    steps = counted(plan.first_step, "step")
    if plan.first_step >= plan.total_steps:
        return f"the run in {train.proj_dir} is complete ({steps})", "raise --epoch_count"
    if lowest.exhausts(train.early_stop):
        steps += f", the last {counted(train.early_stop, 'validation')} without a lower loss"
        return f"the run in {train.proj_dir} is complete ({steps})", "raise --early_stop, or leave it out,"
    return "", ""


def find_trained(folder: Path, newest: str) -> str | None:
    """The file of trained tensors that a new run would overwrite: `newest`, or another in a run's folder; or None."""
    if (folder / newest).exists():
        return newest
    files = [file.name for name in (ADAPTER, MODEL) for file in folder.glob(name.replace(".", "*."))]
    written = [name for name in files if TRAINED.fullmatch(name)]  # a model to start from may lie there
    return min(written) if written and (folder / METRICS).exists() else None
