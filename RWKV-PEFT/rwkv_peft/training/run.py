"""Take one training run from flags to files; `python train.py --help` shows the flags.

Only here do model, adapters, data and engine meet.
"""

import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.inject import InjectReport, inject
from ..adapters.load import load_tensors
from ..adapters.methods import method_of
from ..config import AdapterConfig, RunConfig, TrainConfig
from ..data.batches import TrainBatches
from ..data.recorded import find_tokenizer
from ..data.samples import Samples
from ..data.sft import refuse_hub_name
from ..data.show import marks_for, show_samples
from ..data.sources import check_config
from ..errors import UserError, past_ctrl_c
from ..files.adapters import read_adapter
from ..files.alone import alone_in
from ..files.atomic import check_output
from ..files.base import Base, open_base
from ..files.dtypes import DTYPES
from ..fused import Setting, fuse
from ..models import family_named
from ..models.family import Family
from ..models.parts import LanguageModel
from ..names import ADAPTER, METRICS, MODEL, STATE
from ..plots import plot_loss
from .engine.fit import fit
from .engine.machine import own_device, resolve_accelerator
from .engine.prepared import Prepared
from .engine.progress import telling_compilations
from .flags.epochs import with_chosen_epochs
from .flags.new_model import write_new_model
from .flags.rates import with_first_rates
from .flags.request import Request, parse_run
from .header import describe, describe_adapter
from .inputs import find_samples
from .measuring.before_after import BeforeAfter
from .measuring.examiner import Examiner
from .measuring.exams import find_exams, find_rows
from .measuring.validate import RETAINED, VALIDATION, Validator
from .ranks.agreement import digests_of_inputs, passport
from .ranks.lost_pages import sizes_of_mapped
from .ranks.meeting import Ranks
from .saving.checkpoints import ROWS, UNSAVED, clear_unsaved
from .saving.identity import data_identity
from .saving.keeping import clear_hidden, discard_old
from .saving.resume import AUTO, completed, find_state, lowest_before, other_retained, validated_from
from .saving.room import require_room_to_save
from .saving.saved_files import require_files
from .saving.saver import Saver
from .saving.start import start_adapter, start_states
from .step.gradients import estimate_gradients
from .step.plan import Plan


def main(argv: list[str]) -> int:
    """Run train.py. Returns the exit code, 128 + the number of the signal after an interrupt."""
    request = parse_run(argv)
    say = print if request.world.rank == 0 else silent
    try:
        if request.check_flags:
            return check(request, say)
        if request.config.train.show_samples:
            return show(request, say)
        if request.new_file:
            return write_new_model(request.config, say) if request.world.rank == 0 else 0
        code, words = run(request, say)
        past_ctrl_c()
        if words:
            say(words)
        return code
    except KeyboardInterrupt as interrupt:
        if request.world.leads:
            print("interrupted; what was saved before is intact", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def silent(*words: object, **options: object) -> None:
    """Print nothing: the `say` of ranks whose output nobody watches."""


def check(request: Request, say: Callable[..., object] = print) -> int:
    """Check a Request against the base and this machine, without reading data: --check_flags. Returns the exit code."""
    config = request.config
    accelerator = resolve_accelerator(config.train)
    check_config(config.data)
    refuse_hub_name(config.data)
    folder = Path(config.train.proj_dir)
    if not config.train.resume:  # a checkpoint is compared with the data, which is not read here
        find_state(folder, config.train, {"adapter": asdict(config.adapter)})
    check_output("--proj_dir", folder / "checkpoints" / "state.json", [])
    for note in request.notes:
        say(f"note: {note}")
    say(f"these flags can work: {describe_adapter(config.adapter)}, {config.train.devices} {accelerator}")
    return 0


def show(request: Request, say: Callable[..., object] = print) -> int:
    """Print samples as the model would see them: --show_samples. Returns the exit code."""
    config = request.config
    samples, _ = find_samples(config)
    tokenizer = find_tokenizer(None, config.model.vocab_size, samples.vocabulary)
    say(show_samples(samples, config.train.show_samples, tokenizer, marks_for(sys.stdout)))
    return 0


def run(request: Request, say: Callable[..., object] = print) -> tuple[int, str]:
    """Train as a Request says; `say` prints for the user. Returns (the exit code, how it ended in words)."""
    world, train = request.world, request.config.train
    folder = Path(train.proj_dir)
    with ExitStack() as held:
        ranks = held.enter_context(Ranks(world, request.argv, train.join_minutes, print if world.leads else silent))
        if world.rank == 0:
            held.enter_context(alone_in(folder, say))
        held.enter_context(telling_compilations(world.rank == 0))
        return run_on(ranks, request, say)


def run_on(ranks: Ranks, request: Request, say: Callable[..., object]) -> tuple[int, str]:
    """Do the work of `run` on Ranks that are yet to meet."""
    config, base, world = request.config, request.base, request.world
    train, folder = config.train, Path(config.train.proj_dir)
    accelerator = resolve_accelerator(train)
    step_samples = config.data.micro_bsz * world.size * train.accumulate_grad_batches
    samples, measured = find_samples(config)
    of_measured = {name: data_identity(config, found) for name, found in measured.items()}
    validation, retained = (of_measured.get(name, {}).get("content", "") for name in (VALIDATION, RETAINED))
    identity: dict[str, Any] = {
        "adapter": asdict(config.adapter),
        "base": "" if base is None else base.fingerprint,
        "data": data_identity(config, samples),
        "objective": train.objective,
        "strategy": train.strategy,
        "world_size": world.size,
        "precision": train.precision,
        "validation": validation,
        "retained": retained,
    }
    checkpoint, state = find_state(folder, train, identity)
    if checkpoint is not None and state is not None and world.rank == 0:
        require_files(checkpoint, state["files"], train.fresh_optimizer, contents=True)
    samples.notes += other_retained(state, retained)
    if state:
        train = with_first_rates(train, state)
    train = with_chosen_epochs(train, -(-len(samples) // step_samples), state)
    config = with_tokenizer(replace(config, train=train), samples)
    plan = make_plan(train, samples, step_samples, state)
    identity["validated_from"] = validated_from(plan, state, validation)
    lowest = lowest_before(train, plan, identity["validated_from"])
    complete, remedy = completed(train, plan, lowest) if state else ("", "")
    if complete and train.resume == AUTO:
        if world.rank == 0:  # a run may have died after its last save, before these
            plot_loss(folder / METRICS, folder / "loss.png")
            discard_old(folder, train.keep_checkpoints)
        return 0, complete
    if complete:
        raise UserError(f"--resume: {complete}; {remedy} to go on")
    if base is not None:
        base.require_finite()
    exams = find_exams(config, samples, speaks=world.rank == 0)
    rows, note = find_rows(config, samples, measured)
    samples.notes += filter(None, [note])
    others = {
        "the checkpoint to go on from": checkpoint and checkpoint.name,
        **digests_of_inputs(config, world, goes_on=checkpoint is not None),
        **{f"the data of {name}_loss": data["content"] + data["files"] for name, data in of_measured.items()},
        **{f"the questions of {name}": exam.digest for name, exam in exams.items()},
        "the rows to answer": "" if rows is None else rows.digest,
    }
    ranks.meet(passport(config, identity, others), folder, train.stall_minutes)
    assert ranks.watch is not None  # because they have met
    ranks.watch.watch_files(sizes_of_mapped(base, (samples, *measured.values())))

    torch.manual_seed(train.random_seed)
    family = family_named(config.model.version)
    model = build_model(config, family, base)
    batches = TrainBatches(
        samples, config.data.micro_bsz, world_size=world.size, accumulate=train.accumulate_grad_batches
    )
    device = own_device(accelerator, world.local_rank)

    def gradients() -> dict[str, torch.Tensor]:
        if train.stage != 3:  # stage 3 is for models that one GPU may not hold
            model.to(device)
        return estimate_gradients(model, request.layers, batches.first_counted(), train.chunk_ctx)

    report = adapt(model, config.adapter, request.layers, family, base, gradients, checkpoint, device)
    if checkpoint is not None and train.fresh_optimizer:
        if config.adapter.whole_model:
            load_tensors(model, open_base(checkpoint / MODEL).tensors, checkpoint / MODEL)
        checkpoint = None  # its optimizer state may belong to other ranks
    fused = fuse(model, Setting.of(config, device))
    if world.rank == 0:  # the others would each open GPU 0 to see whether the kernels work
        for note in request.notes:
            say(f"note      {note}")
        describe(config, family, accelerator, samples, batches.notes, plan, report, state, say)
        say(f"fused     {fused}")
        make_way(folder, config, report.trainable, state is None, say)
    saver = Saver(folder, config, plan, identity, base)
    validator = None
    if measured:
        bsz, anew = config.data.micro_bsz, state is None
        validator = Validator(measured, bsz, train, plan, saver, ranks.watch, lowest, anew)
    prepared = Prepared(
        config=config,
        family=family,
        model=model,
        trainable=report.trainable,
        samples=samples,
        validator=validator,
        examiners=[Examiner(exam, folder / name, train, plan, ranks.watch) for name, exam in exams.items()],
        rows=None if rows is None else BeforeAfter(rows, folder / ROWS, ranks.watch, train.compile, state is None),
        saver=saver,
        checkpoint=checkpoint,
        accelerator=accelerator,
        ranks=ranks,
    )
    return fit(prepared, say)


def make_way(folder: Path, config: RunConfig, trains: int, anew: bool, say: Callable[..., object]) -> None:
    """Clear a run's folder of what a killed run left, and check that there is room for a save; mark a run that begins
    anew as UNSAVED until its first checkpoint."""
    clear_hidden(folder)
    if anew:
        if (folder / METRICS).exists():
            say("          a run there ended before it saved anything: nothing trained is lost, and it starts anew")
        clear_unsaved(folder)
    require_room_to_save(folder, config, trains)
    if anew:
        (folder / UNSAVED).touch()


def with_tokenizer(config: RunConfig, samples: Samples) -> RunConfig:
    """Return the RunConfig with the recorded tokenizer of token files that were made before, "" if none is recorded;
    data of rows keeps its tokenizer."""
    if config.data.of_rows:
        return config
    name = samples.vocabulary.name if samples.vocabulary else ""
    return replace(config, data=replace(config.data, tokenizer=name))


def make_plan(train: TrainConfig, samples: Samples, step_samples: int, state: Mapping[str, Any] | None) -> Plan:
    """Make the run's Plan. A resumed run starts at its sample cursor, whatever the size of its steps was before."""
    epoch_steps = train.epoch_steps or -(-len(samples) // step_samples)
    first_step = train.epoch_begin * epoch_steps
    first_sample = first_step * step_samples
    if state:
        first_sample = state["samples_seen"]
        first_step = first_sample // step_samples
    return Plan(step_samples, epoch_steps, train.epoch_count * epoch_steps, first_step, first_sample)


def build_model(config: RunConfig, family: Family, base: Base | None) -> LanguageModel:
    """Build the model in the run's precision, with the states to tune, if any. Its weights are the base's,
    memory-mapped if the dtypes agree, or fresh ones."""
    dtype, grad_cp = DTYPES[config.train.precision], config.train.grad_cp
    if base is not None:
        model = family.load(base.tensors, config.model, grad_cp)
    else:
        model = family.build(config.model, grad_cp)
        family.init_weights(model)
    model = model.to(dtype)
    if STATE in config.adapter.train_parts:
        model.tune_states(start_states(config.train.state_load, config.model, family, base))
    return model


def adapt(
    model: LanguageModel,
    adapter: AdapterConfig,
    layers: tuple[str, ...],
    family: Family,
    base: Base | None,
    gradients: Callable[[], Mapping[str, torch.Tensor]],
    checkpoint: Path | None = None,
    device: torch.device | None = None,
) -> InjectReport:
    """Inject the adapter into the model: from the checkpoint to resume from, with the factors that it began with; from
    --bone_load and its kin; or fresh, from gradients if the method needs them. device is inject's."""
    method, loaded = method_of(adapter), None
    found: Mapping[str, torch.Tensor] = {}
    if checkpoint is not None and not adapter.whole_model:
        loaded = read_adapter(checkpoint / ADAPTER)
    elif adapter.load:
        assert base is not None  # the flags were checked for that
        loaded = start_adapter(adapter, base)
    elif method is not None and method.from_gradient:
        found = gradients()
    initial = loaded.tensors if loaded else {}
    report = inject(model, adapter, layers, family=family, initial=initial, gradients=found, device=device)
    if loaded:
        load_tensors(model, loaded.tensors, str(checkpoint or adapter.load))
    return report
