"""The inputs of a run: its samples, the checkpoint that it resumes from, and its place in the data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from os.path import realpath
from pathlib import Path
from typing import Any

from ..checkpoints.base import Base
from ..cli.errors import some
from ..cli.names import METRICS
from ..config import RunConfig, TrainConfig
from ..data.answer_samples import PromptSamples, overlap_notes
from ..data.mixture import Joined
from ..data.recorded import chat_in, default_mask, recorded_beside, remarks, require_same
from ..data.rows import held_out_split, parse_split
from ..data.samples import Samples
from ..data.sources import build_samples, parts_of, split_samples
from .batch_size import with_batch_size
from .flags.request import Request
from .rates import with_chosen_epochs, with_first_rates
from .saving.checkpoints import require_files, saved_state
from .saving.resume import Lowest, data_identity, find_state, history, validated_from, with_kept_order
from .step.plan import Plan
from .step.teacher import require_own_tokens

VALIDATION, RETAINED = "val", "retain"  # the names of a data set's numbers begin so


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run.

    config: with all choices made; base: None for a new model; samples to train on, and `measured` ones for validation
    by name, with their identities in of_measured; checkpoint and its state.json: None for a run that begins; identity:
    equal in a run that resumes; plan; lowest: its lowest validation so far; teacher: its model, or None.
    """

    config: RunConfig
    base: Base | None
    samples: Samples
    measured: Mapping[str, Samples]
    of_measured: Mapping[str, Mapping[str, Any]]
    checkpoint: Path | None
    state: Mapping[str, Any] | None
    identity: dict[str, Any]
    plan: Plan
    lowest: Lowest
    teacher: Base | None

    @property
    def folder(self) -> Path:
        """The folder that the run writes to."""
        return Path(self.config.train.proj_dir)


def find_inputs(request: Request, memory: int = 0) -> Inputs:
    """Find the Inputs of a Request, for GPUs of `memory` bytes (0: a CPU). Raises UserError if a run that resumes would
    read something else than before."""
    config, base, world, teacher = request.config, request.base, request.world, request.teacher
    # Before the data is read, because the order of rows follows from it. find_state checks it, once the data is known.
    saved = saved_state(config.train.proj_dir, config.train.resume)
    config = replace(config, data=with_kept_order(config.data, saved))
    samples, measured = find_samples(config)
    # Before the plan, which counts steps in micro batches.
    if not saved:  # a run that goes on keeps its rows
        config, notes = with_batch_size(request, config, len(samples), memory)
        # Rows of like length are brought together only if several share a batch: that is known now.
        for part in samples.parts:
            part.bucket(config.data.buckets)
        samples.notes += notes
    train, step_samples = config.train, config.step_samples
    if teacher is not None:
        require_own_tokens(teacher, samples.vocabulary)
    if isinstance(samples, PromptSamples):
        samples.repeat(step_samples, config.objective.together)
    of_measured = {name: data_identity(config, held_out) for name, held_out in measured.items()}
    validation = of_measured.get(VALIDATION, {}).get("content", "")
    # All that a checkpoint is compared with. The names are keys of state.json (saving/resume.py).
    identity: dict[str, Any] = {
        "adapter": asdict(config.adapter),
        "base": "" if base is None else base.fingerprint,
        "data": data_identity(config, samples),
        "strategy": train.strategy,
        "world_size": world.size,
        "objective": config.objective.name,
        "teacher": "" if teacher is None else teacher.fingerprint,
        "precision": train.precision,
        "optim": train.optim,
        "validation": validation,
    }
    checkpoint, state = find_state(Path(train.proj_dir), train, identity)
    if checkpoint is not None and state is not None and world.rank == 0:
        # By one rank: it reads every file whole.
        require_files(checkpoint, state["files"], train.fresh_optimizer, contents=True)
    if state:
        # Before the epochs are chosen: both are the choices of the run as it began.
        train = with_first_rates(train, state)
    train = with_chosen_epochs(train, config.objective, -(-len(samples) // step_samples), state)
    config = replace(config, train=train)
    if not config.data.of_rows:  # token files were made before, with the recorded tokenizer ("": none is recorded)
        name = samples.vocabulary.name if samples.vocabulary else ""
        chats = {file: chat_in(file) for file in config.data.files}
        clean, form = all(chat.clean for chat in chats.values()), chats[config.data.path].tool_form.name
        if others := [file for file, chat in chats.items() if chat.tool_form.name != form]:
            samples.notes.append(
                f"note: {some(others)} has tools in another form than {config.data.path}; chats with the result take "
                f"--tool_form {form} unless they give another"
            )
        config = replace(config, data=replace(config.data, tokenizer=name, clean_turns=clean, tool_form=form))
    plan = make_plan(train, samples, step_samples, state)
    # Losses of other validation data are no measure for this one: the lowest counts from here.
    identity["validated_from"] = validated_from(plan, state, validation)
    lowest = Lowest(history(Path(train.proj_dir) / METRICS, plan, since=identity["validated_from"]))
    parts = (samples, measured, of_measured, checkpoint, state, identity, plan, lowest)
    return Inputs(config, base, *parts, teacher)


def make_plan(train: TrainConfig, samples: Samples, step_samples: int, state: Mapping[str, Any] | None) -> Plan:
    """Make the run's Plan. A resumed run starts at its sample cursor, whatever the size of its steps was before."""
    epoch_steps = train.epoch_steps or -(-len(samples) // step_samples)
    first_step = train.epoch_begin * epoch_steps
    first_sample = first_step * step_samples
    if state:
        first_sample = state["samples_seen"]
        first_step = first_sample // step_samples
    return Plan(step_samples, epoch_steps, train.epoch_count * epoch_steps, first_step, first_sample)


def find_samples(config: RunConfig) -> tuple[Samples, dict[str, Samples]]:
    """Find (training samples, {VALIDATION or RETAINED: samples to measure, if flags name them}).

    Notes on all of them are among the training samples' notes.
    """
    data, train, vocab_size = config.data, config.train, config.model.vocab_size
    measured: dict[str, Samples] = {}
    # --sft_split's range of rows is only for the training data; its name also chooses the split of other folders
    whole = replace(data.own, sft_split=parse_split(data.sft_split)[0], more=(), mix=())
    # The held-out rows leave the training data here, before anything else counts its rows.
    if train.val_split:
        samples, measured[VALIDATION] = split_samples(data, vocab_size, train.val_split, train.val_seed)
    else:
        samples = build_samples(data, vocab_size)
    # --val_data beside --val_split is refused by the rules: at most one of them fills measured[VALIDATION].
    others = replace(whole, path=train.val_data, more=train.more_val)
    held_out: dict[str, Samples] = {}
    for name, other in parts_of(others, "--val_data").items() if train.more_val else [("", others)]:
        if not other.path:
            continue
        split = held_out_split(other.path) if data.of_rows else ""
        other = replace(other, sft_split=split or whole.sft_split)
        held_out[name] = file_samples = build_samples(other, vocab_size)
        require_same(samples.vocabulary, data.path, file_samples.vocabulary, f"--val_data {other.path}")
        named = f"{other.path}, split {split}" if split else other.path
        samples.notes.append(f"validation on {len(file_samples):,} samples of {named}: {file_samples.notes[0]}")
        samples.notes += [f"--val_data {other.path}: {note}" for note in file_samples.row_notes]
        if realpath(other.path) in map(realpath, data.files) and other.sft_split == whole.sft_split:
            samples.notes.append(
                f"note: --val_data {named} is the training data, so that its loss says nothing about other text; "
                "--val_split 0.01 keeps samples back for validation"
            )
    if held_out:
        measured[VALIDATION] = Joined(held_out) if train.more_val else held_out[""]
    elif VALIDATION in measured:
        held_out[""] = measured[VALIDATION]
    for file_samples in held_out.values():
        samples.notes += overlap_notes(samples, file_samples)
    if train.retain_data:
        other = replace(whole, path=train.retain_data)
        if data.loss_mask == "file" and not data.of_rows:  # data to retain may have no .mask file
            other = replace(other, loss_mask=default_mask(other.path))
        measured[RETAINED] = retained = build_samples(other, vocab_size)
        require_same(samples.vocabulary, data.path, retained.vocabulary, f"--retain_data {train.retain_data}")
        samples.notes.append(
            f"forgetting is measured on {len(retained):,} samples of {other.path}: {retained.notes[0]}"
        )
        samples.notes += [f"--retain_data {other.path}: {note}" for note in retained.row_notes]
        if data.replay and realpath(other.path) == realpath(data.replay):
            samples.notes.append(
                f"note: --retain_data {other.path} is replayed, so that its loss says nothing about other text; name "
                "other data"
            )
    samples.notes += remarks(samples.vocabulary, recorded_beside(train.load_model), vocab_size)
    return samples, measured
