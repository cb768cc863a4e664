"""Begin a run or go on with one: --resume, the identity that both must share, and the records that stay."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...checkpoints.atomic import write_text
from ...checkpoints.readable import reading
from ...cli.errors import UserError
from ...cli.names import ADAPTER, HERMES, METRICS, MODEL, is_number
from ...cli.parser import counted
from ...config import AdapterConfig, DataConfig, RunConfig, TrainConfig, to_json
from ...config.data import think_bounds
from ...data.mixture import shares_of
from ...data.samples import Samples
from ...plots import read_metrics
from ..optimizers import BY_RANK
from ..step.plan import Plan
from .checkpoints import (
    CHECKPOINTS,
    OPTIMIZER,
    STATE,
    TRAINED,
    UNSAVED,
    find_checkpoint,
    read_state,
    remedy_of,
    require_files,
)
from .products import newest_name

MUST, AUTO = "must", "auto"  # --resume by itself, and --resume auto
HASHED = 64  # samples that are hashed, to distinguish one data set from another
SAME = ("adapter", "base", "data", "objective", "teacher")  # a resumed run must share these with the first
SAME_OPTIMIZER = ("precision", "optim")  # and these, to keep the optimizer's state,
SAME_RANKS = ("strategy", "world_size")  # and these, if that is kept by ranks
NEEDED = ("samples_seen", "trained", "validated_from", "validation")  # other entries that are read


def find_state(
    folder: Path, train: TrainConfig, identity: Mapping[str, Any]
) -> tuple[Path | None, dict[str, Any] | None]:
    """(checkpoint folder, its state.json) to resume from, or (None, None) for a fresh run.

    A run that ended before its first checkpoint left nothing to resume and nothing to lose, so it starts anew: with or
    without --resume if it had written no trained tensors yet, else only with --resume auto. Raises UserError if
    --resume and the folder contradict each other.
    """
    checkpoint = find_checkpoint(folder)
    if checkpoint is not None and train.resume:
        state = read_run_state(checkpoint, identity, train.fresh_optimizer)
        if train.forget_at_most is not None and state["config"]["train"].get("forget_at_most") is None:
            raise UserError(
                f"--forget_at_most: the run in {folder} began without it, and has not kept where it began; leave it "
                "out, and give it to merge_bone.py"
            )
        return checkpoint, state
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


def find_trained(folder: Path, newest: str) -> str | None:
    """The file of trained tensors that a new run would overwrite: `newest`, or another in a run's folder; or None."""
    if (folder / newest).exists():
        return newest
    files = [file.name for name in (ADAPTER, MODEL) for file in folder.glob(name.replace(".", "*."))]
    written = [name for name in files if TRAINED.fullmatch(name)]  # a model to start from may lie there
    return min(written) if written and (folder / METRICS).exists() else None


READ = ("encoding", "document_end")  # settings of texts, whose hashes tell what they did


def data_identity(config: RunConfig, samples: Samples) -> dict[str, Any]:
    """The data's identity: settings that choose and order samples, their number, hashes, and a digest of the files.

    With it a sample number means the same in a resumed run, wherever the files lie.
    """
    settings = {
        name: value
        for name, value in asdict(config.data).items()
        if name not in ("path", "more", "replay", "tokenizer", "micro_bsz", "bucketed", *READ)
    }
    if not config.data.clean_turns:
        del settings["clean_turns"]  # as in runs from before there was such a setting
    for name in ("sft_as", "turns_in_text"):
        if not settings[name]:
            del settings[name]
    if config.data.tool_form == HERMES:
        del settings["tool_form"]  # likewise; if rows hold tools, their hashes differ in another form
    if config.data.dataload == "pad":  # the order of samples depends on it (data/samples.py)
        settings["rows_share_batches"] = config.data.buckets
    settings["mix"] = shares_of(config.data.mix)  # 7 3 is the mix 0.7 0.3
    if config.train.val_seed is not None:
        settings["val_seed"] = config.train.val_seed
    content, counted_tokens = hashlib.sha256(), hashlib.sha256()
    head = samples.head()
    for n in range(0, len(head), -(-len(head) // HASHED)):
        sample = head.collate([head[n]])
        content.update(sample.get("teacher_tokens", sample["tokens"]).numpy().tobytes())
        counted_tokens.update(sample.get("weights", sample["mask"]).numpy().tobytes())
    hashes = {"content": content.hexdigest()[:16], "counted": counted_tokens.hexdigest()[:16]}
    hashes["files"] = digest_of_data(config, samples)
    return settings | {"val_split": config.train.val_split, "samples": len(samples)} | hashes


def digest_of_data(config: RunConfig, samples: Samples) -> str:
    """The digest of the token files that samples are read from, with weights; masks count if --loss_mask is file."""
    with_mask = config.data.loss_mask == "file"
    digests = "".join(part.dataset.digest(with_mask) for part in samples.parts)
    return hashlib.sha256(digests.encode()).hexdigest()[:16]


def read_run_state(checkpoint: Path, now: Mapping[str, Any], fresh_optimizer: bool = False) -> dict[str, Any]:
    """The state.json of a checkpoint, compared with `now`, the resuming run's identity.

    Raises UserError if they differ, or if a file is not of its recorded size; fresh_optimizer leaves out entries that
    only the optimizer's state needs.
    """
    now = json.loads(json.dumps(now))
    state = {"teacher": ""} | read_state(checkpoint)  # 0.2.0 had none
    if not fresh_optimizer and not (checkpoint / OPTIMIZER).is_dir():
        raise UserError(
            f"--resume: {checkpoint} is of 0.2.0 or before, whose form of the optimizer's state is no longer read; "
            "add --fresh_optimizer: weights and place in the data go on"
        )
    of_optimizer = SAME_OPTIMIZER + (SAME_RANKS if now["optim"] in BY_RANK else ())
    with reading(checkpoint / STATE, remedy=remedy_of(checkpoint, of_optimizer=False)):
        # a setting that the saved run did not have yet had its default
        defaults = {name: value for name, value in json.loads(to_json(DataConfig())).items() if name in now["data"]}
        state["data"] = defaults | state["data"]
        if isinstance(labels := state["data"].get("think_labels"), bool):  # 0.3.0 had one pair of bounds
            state["data"]["think_labels"] = list(think_bounds([int(labels)]))
        if mix := state["data"].get("mix"):
            state["data"]["mix"] = shares_of(mix)
        of_adapter = json.loads(to_json(AdapterConfig()))  # earlier versions had other settings, of other methods
        state["adapter"] = {name: state["adapter"].get(name, default) for name, default in of_adapter.items()}
        missing = [name for name in NEEDED if name not in state]
        if missing:
            raise KeyError(missing[0])
        require_files(checkpoint, state["files"], fresh_optimizer)
        different = [key for key in SAME + (() if fresh_optimizer else of_optimizer) if state[key] != now[key]]
    for key in different:
        if key in of_optimizer:
            remedy = (
                "give the same flags, or add --fresh_optimizer: the optimizer's state cannot move, weights and data go "
                "on"
            )
        elif key == "data":
            remedy = (
                "give the first run's flags and data, or another --proj_dir and --bone_load or its kin to train this "
                "adapter on other data"
            )
        else:
            remedy = "give the first run's flags, or another --proj_dir"
        raise UserError(
            f"--resume: the run in {checkpoint.parent.parent} has {difference(key, state[key], now[key])}; {remedy}"
        )
    return state


def difference(key: str, then: Any, now: Any) -> str:
    """The difference of an identity's entry in words, of several settings only those that differ."""
    if isinstance(now, dict):
        names = [name for name in {**now, **then} if then.get(name) != now.get(name)]
        then, now = ({name: values.get(name) for name in names} for values in (then, now))
    return f"{key} {then}, this command {now}"


def with_kept_order(data: DataConfig, state: Mapping[str, Any]) -> DataConfig:
    """The DataConfig with the order of rows that a run began with, whatever batches it has now. state: the state.json
    that it goes on from, {} if it begins."""
    before = state.get("data", {})
    return replace(data, bucketed=before["rows_share_batches"]) if "rows_share_batches" in before else data


def validated_from(plan: Plan, state: Mapping[str, Any] | None, validation: str) -> int:
    """The sample after which a run's validations are on the data with the hash `validation`; state is the state.json of
    the checkpoint that the Plan goes on from, or None."""
    return plan.first_sample if state is None or state["validation"] != validation else state["validated_from"]


class Lowest:
    """The lowest validation loss of a run's records, in their order, with the number of validations since."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self.loss, self.since = math.inf, 0
        for record in records:
            if is_number(record.get("val_loss")):
                self.note(record["val_loss"])

    def note(self, loss: float) -> bool:
        """Remember one validation loss; True if it is the lowest so far."""
        better = loss < self.loss
        self.loss, self.since = (loss, 0) if better else (self.loss, self.since + 1)
        return better

    def exhausts(self, patience: int) -> bool:
        """True if at least `patience` validations in a row were not lower; never for 0."""
        return 0 < patience <= self.since


def completed(train: TrainConfig, plan: Plan, lowest: Lowest) -> tuple[str, str]:
    """(how the resumed run had ended by its checkpoint, the flag that makes it go on); ("", "") if it had not ended."""
    steps = counted(plan.first_step, "step")
    if plan.first_step >= plan.total_steps:
        return f"the run in {train.proj_dir} is complete ({steps})", "raise --epoch_count"
    if lowest.exhausts(train.early_stop):
        steps += f", the last {counted(train.early_stop, 'validation')} without a lower loss"
        return f"the run in {train.proj_dir} is complete ({steps})", "raise --early_stop, or leave it out,"
    return "", ""


def history(path: Path, plan: Plan, since: int = 0) -> list[dict[str, Any]]:
    """The records of a file of lines for steps that ended after sample `since` and by the first sample of a Plan.

    Their "step" is the Plan's: if steps had another size, the one in which the record's samples would have ended.
    """
    records = []
    for record in read_metrics(path) if path.exists() else ():
        if since < (samples := record.get("samples", 0)) <= plan.first_sample:
            records.append(record | {"step": max(samples // plan.step_samples - 1, 0)})
    return records


def forget_rest(path: Path, plan: Plan) -> None:
    """Keep only the history in a file of lines: a resumed run writes the later records again."""
    if path.exists():
        write_records(path, history(path, plan))


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of lines, a record each, atomically."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
