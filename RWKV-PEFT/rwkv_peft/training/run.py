"""Take one training run from flags to files; `python train.py --help` shows the flags.

Only here do model, adapters, data and engine meet. loop.py has the order of a step. The loss is computed in step/
(steps.py, by an objective). engine.py moves the weights. Answers are sampled in rollout.py. saving/ writes checkpoints
and products.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from types import FrameType

import torch

from ..checkpoints.atomic import check_output
from ..checkpoints.lock import alone_in
from ..cli.errors import HANGUP, Diverged, UserError, hangup_signals, keeping_handlers, past_ctrl_c
from ..cli.names import FORGETTING, FORGETTING_PICTURE, METRICS, PICTURE
from ..config import RunConfig
from ..config.objective import REWARDS
from ..data.answer_samples import PromptSamples
from ..data.batches import TrainBatches
from ..data.recorded import find_tokenizer
from ..data.report import show_samples
from ..data.row_settings import refuse_hub_name
from ..data.samples import Samples
from ..environments.environments import Environments
from ..gpus import gpu_memory, resolve_accelerator
from ..memory import keep_freed_memory
from ..ops.products import computing
from ..plots import plot_loss
from ..rewards import Judges, Rewards
from .ending import exit_code, report_end, write_run_config
from .flags.parser import WRITE
from .flags.request import Request, parse_run
from .flags.settings_file import write
from .header import describe, describe_adapter
from .inputs import Inputs, find_inputs, find_samples
from .loop import StopRequest, train
from .measuring import find_questions
from .model import make_model, own_device, write_new_model
from .prepared import TrainingRun
from .progress import printing_compilations
from .ranks.agreement import shared_values
from .ranks.group import INTACT, Ranks, ignore_signals, launch, upon_second_signal
from .saving.checkpoints import (
    DIVERGED,
    UNSAVED,
    clear_hidden,
    clear_unsaved,
    discard_old,
    find_checkpoint,
    telling_refusals,
)
from .saving.loggers import make_trackers
from .saving.products import require_room_to_save
from .saving.resume import AUTO, completed, find_state
from .step.compiling import compiled


def main(argv: list[str]) -> int:
    """Run train.py. Returns the exit code, 128 + the number of the signal after an interrupt."""
    request = parse_run(argv)
    # One voice for all ranks.
    say = print if request.world.rank == 0 else silent
    try:
        if request.checks:
            return check(request, say)
        if request.writes:
            return write_config(request, say)
        if request.config.train.show_samples:
            return show(request, say)
        if request.makes_model:
            return write_new_model(request.config, say) if request.world.rank == 0 else 0
        # This process trains only if it is alone. Else it starts one process for each device and waits for them.
        if request.world.launches and request.world.size > 1:
            return launch(request.world, request.argv, request.config.train)
        code, words = run(request, say)
        # From here on Ctrl-C has nothing left to stop, and must not turn a run that is done into one that failed.
        past_ctrl_c()
        if words:
            say(words)
        return code
    except KeyboardInterrupt as interrupt:
        print(INTACT, file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def silent(*words: object, **options: object) -> None:
    """Print nothing: the `say` of all ranks but the first."""


def check(request: Request, say: Callable[..., object] = print) -> int:
    """Check a Request against the base and this machine, without reading data: --check_flags. Returns the exit code."""
    config = request.config
    accelerator = resolve_accelerator(config.train)
    refuse_hub_name(config.data)
    folder = Path(config.train.proj_dir)
    if not config.train.resume:  # a checkpoint is compared with the data, which is not read here
        find_state(folder, config.train, {"adapter": asdict(config.adapter)})
    check_output("--proj_dir", folder / "checkpoints" / "state.json", [])
    for note in request.notes:
        say(f"note: {note}")
    say(f"these flags can work: {describe_adapter(config.adapter)}, {config.train.devices} {accelerator}")
    return 0


def write_config(request: Request, say: Callable[..., object]) -> int:
    """Write the flags of a Request that can work to a file: --write_config. Returns the exit code."""
    name = request.writes
    if request.world.rank == 0:
        check_output(WRITE, name, [])
        write(Path(name), request.config.flags)
        say(f"wrote {name}; --config {name} takes these flags, and those of the command line win")
    return 0


def show(request: Request, say: Callable[..., object] = print) -> int:
    """Print samples as the model would see them: --show_samples. Returns the exit code."""
    config = request.config
    samples, _ = find_samples(config)
    tokenizer = find_tokenizer(None, config.model.vocab_size, samples.vocabulary)
    say(show_samples(samples, config.train.show_samples, tokenizer))
    return 0


def run(request: Request, say: Callable[..., object] = print) -> tuple[int, str]:
    """Train by a Request; `say` prints for the user. Returns (the exit code, a sentence on the run's end)."""
    world, train = request.world, request.config.train
    device = own_device(resolve_accelerator(train), world.local_rank)
    with Ranks(world, train, device) as ranks:
        # Entered in this order and left in the reverse: the lock of the folder is held until all else is closed.
        with ExitStack() as held:
            if world.rank == 0:
                held.enter_context(alone_in(Path(train.proj_dir), say))
            held.enter_context(printing_compilations(world.rank == 0))
            if world.size > 1:
                held.enter_context(upon_second_signal(ranks.stop))
                held.push(ignore_signals)
            code, words = run_on(ranks, request, device, say)
        return ranks.leave(code), words


def run_on(ranks: Ranks, request: Request, device: torch.device, say: Callable[..., object]) -> tuple[int, str]:
    """Do the work of `run` as one of its Ranks, on a device."""
    leads, accelerator = request.world.rank == 0, "cpu" if device.type == "cpu" else "gpu"
    # The least memory of any rank's GPU, so that all choose the same batch.
    inputs = find_inputs(request, ranks.least(gpu_memory(device)))
    config, samples = inputs.config, (inputs.samples, *inputs.measured.values())
    # Before the base is read through and the model is made: a run that is complete ends within a second.
    if words := require_more_to_train(inputs, leads):
        return 0, words
    # A NaN in a downloaded file would show as a loss that diverges at the first step.
    for base in filter(None, (inputs.base, inputs.teacher)):
        base.require_finite()
    asked = find_questions(inputs)
    # How CPUs multiply, alike on all ranks: else a step would mix gradients of different roundings.
    row, notes = ranks.row(inputs.state)
    with judging(config, samples) as judges, computing(row):
        if request.world.size > 1:
            # Ranks that read other files or flags would wait for each other forever, or learn nonsense.
            ranks.agree(shared_values(inputs, asked), inputs.folder)
        train, accumulate = config.train, config.train.accumulate_grad_batches
        batches = TrainBatches(samples[0], config.data.micro_bsz, groups=train.groups, accumulate=accumulate)
        model, report = make_model(inputs, request.layers, batches, device)
        if leads:  # the others would each open GPU 0 to see whether the kernels work
            for note in (*request.notes, *notes):
                say(f"note      {note}")
            describe(inputs, accelerator, batches.notes, report, say)
            prepare_folder(inputs, report.trainable, say)
        ready = TrainingRun(inputs, asked, model, judges, device, request.world)
        return train_to_the_end(ready, say)


def train_to_the_end(run: TrainingRun, say: Callable[..., object]) -> tuple[int, str]:
    """Train a Run until it is over, a signal stops it, or it diverges -> (the exit code, how it ended in words)."""
    if run.accelerator == "cpu":
        keep_freed_memory()
    # Signals only set this. The loop reads it after each step, when all ranks can stop at the same one.
    stop = StopRequest()
    try:
        with (
            telling_refusals(run.folder),
            compiled(run.model, run.config.data) if run.config.train.compile else nullcontext(),
            stopping_at_signals(stop, say),
        ):
            if run.leads:
                write_run_config(run)
                run.trackers = make_trackers(run.config, run.folder, run.plan.first_step)
            done = train(run, stop)
            if run.leads:
                return report_end(run, done, stop, say)
            return exit_code(run, done, stop), ""
    except Diverged as error:
        last = find_checkpoint(run.folder)
        say(
            f"error: {error}; {DIVERGED}. "
            + (f"The last good checkpoint is {last}" if last else "No checkpoint had been saved yet")
            + "; try a lower --lr_init, or --precision fp32",
            file=sys.stderr,
        )
        return 1, ""


@contextmanager
def stopping_at_signals(stop: StopRequest, say: Callable[..., object]) -> Iterator[None]:
    """Within the steps of the loop, Ctrl-C, SIGTERM and a terminal that goes away (SIGHUP) request a save and a stop
    after the current one; a second Ctrl-C or SIGTERM stops at once. Before the steps they do what they did before."""

    def request(number: int, frame: FrameType | None) -> None:
        number = signal.Signals(number)
        if stop.stage == "before":
            signal.signal(number, before[number])
            signal.raise_signal(number)
            return
        if stop.signal not in (0, *HANGUP):  # an agent sends SIGTERM after a second SIGHUP
            raise KeyboardInterrupt(number)
        if number in HANGUP:
            signal.signal(number, signal.SIG_IGN)  # both the system and the shell send one
        stop.signal = stop.signal or number
        if number not in HANGUP and stop.stage == "steps":  # else the run is ending anyway
            words = "\nstopping after this step; again to stop at once, without saving"
            # by another thread, because this one may be in the middle of a print
            Thread(target=say, args=(words,), kwargs={"flush": True}).start()

    numbers = (signal.SIGINT, signal.SIGTERM, *hangup_signals())
    before = {number: signal.getsignal(number) for number in numbers}
    with keeping_handlers():
        for number in numbers:
            signal.signal(number, request)
        yield


def require_more_to_train(inputs: Inputs, leads: bool) -> str:
    """Return "" if there are steps to train, else how the run that --resume auto goes on from had ended.

    A process that `leads` then draws the picture and discards the old checkpoints of such a run. Raises UserError for
    --resume by itself of it."""
    train, folder = inputs.config.train, inputs.folder
    complete, remedy = completed(train, inputs.plan, inputs.lowest) if inputs.state else ("", "")
    if complete and train.resume != AUTO:
        raise UserError(f"--resume: {complete}; {remedy} to go on")
    if complete and train.forget_at_most is not None and not (folder / FORGETTING).exists():
        raise UserError(
            f"--forget_at_most: {complete}, and it ended before that was measured; merge_bone.py has that flag, too"
        )
    if complete and leads:  # a run may have died after its last save, before these
        plot_loss(folder / METRICS, folder / PICTURE)
        discard_old(folder, train.keep_checkpoints)
    return complete


@contextmanager
def judging(config: RunConfig, data: Sequence[Samples]) -> Iterator[Judges]:
    """Within, have the Judges of a run. Raises UserError for rewards and environments that cannot be opened, for a row
    of its data that lacks a field that they read, and for an environment without a score beside no reward."""
    objective = config.objective
    if REWARDS not in objective.needs:
        yield Judges()
        return
    with ExitStack() as opened:
        rewards = environments = None
        if objective.reward:
            rewards = opened.enter_context(Rewards.open(objective.reward, objective.weights))
        if objective.environments:
            environments = opened.enter_context(Environments.open(objective.environments))
            if rewards is None and not environments.scoring:
                raise UserError("--environment: its class has no get_reward, and there is no --reward; add one of them")
        for samples in data:
            assert isinstance(samples, PromptSamples)
            if rewards is not None:
                rewards.check_rows(map(json.loads, samples.rows))
            if environments is not None:
                environments.check_rows(map(json.loads, samples.rows))
        yield Judges(rewards, environments)


def prepare_folder(inputs: Inputs, trains: int, say: Callable[..., object]) -> None:
    """Clear a run's folder of a killed run's leftovers and check its disk. Mark a run that begins anew as UNSAVED."""
    folder, anew = inputs.folder, inputs.state is None
    for name in (FORGETTING, FORGETTING_PICTURE):  # of an earlier end
        (folder / name).unlink(missing_ok=True)
    clear_hidden(folder)
    if anew:
        if (folder / METRICS).exists():
            say("          a run there ended before it saved anything: nothing trained is lost, and it starts anew")
        clear_unsaved(folder)
    require_room_to_save(folder, inputs.config, trains)
    if anew:
        (folder / UNSAVED).touch()
