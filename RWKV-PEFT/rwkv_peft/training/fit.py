"""The training loop of a run that is prepared: Lightning's Trainer over DeepSpeed, and how it ended."""

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..adapters.groups import learning_ratios
from ..adapters.methods import method_of
from ..cli import counted
from ..config import RunConfig, TrainConfig
from ..data.recorded import ENTRY, RUN
from ..data.samples import Samples
from ..errors import UserError, ending_at_ctrl_c
from ..files.atomic import atomic_write
from ..memory import keep_freed_memory
from ..models.family import Family
from ..models.parts import LanguageModel
from ..models.state import TIME_STATE
from ..names import STATE
from .checkpoints import find_checkpoint, telling_refusals
from .examiner import Examiner
from .gathering import live_parameters
from .graphs import Graphed
from .loggers import make_loggers
from .meeting import Ranks
from .saver import Saver
from .steps import Segments, Step, Whole
from .validate import Validator


def step_of(train: TrainConfig) -> Step:
    """What a step computes of a batch: whole rows, their blocks replayed where they are to be, or segments of them."""
    if not train.chunk_ctx:
        return Graphed() if train.cuda_graphs else Whole()
    return Segments(train.chunk_ctx, train.bptt_segments, together="stage_3" in train.strategy)


def quiet() -> None:
    """Leave the user's terminal to us: the libraries' banners and tips are not about this run."""
    for name in (
        "lightning",
        "lightning.pytorch",
        "lightning.fabric",
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
        "DeepSpeed",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (
        ".*does not have many workers.*",
        ".*`IterableDataset`.*",
        ".*overridden `transfer_batch_to_device`.*",
        ".*isinstance.treespec.*",
        ".*barrier.*device under current context.*",
        ".*torch.distributed.*deprecated.*",
    ):
        warnings.filterwarnings("ignore", text)


def fit(
    config: RunConfig,
    family: Family,
    model: LanguageModel,
    trainable: int,
    samples: Samples,
    validator: Validator | None,
    examiners: Sequence[Examiner],
    saver: Saver,
    checkpoint: Path | None,
    accelerator: str,
    ranks: Ranks,
    say: Callable[..., object],
) -> tuple[int, str]:
    """Run Lightning's Trainer over the plan, on Ranks that have met; returns (the exit code, how it ended in words)."""
    train, folder, plan, watch = config.train, saver.folder, saver.plan, ranks.watch
    assert watch is not None  # since they have met
    watch.moved("the start")
    if accelerator == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would take a GPU that is there
        keep_freed_memory()
    with ending_at_ctrl_c():
        import lightning.pytorch as pl

        from ..plots import METRICS, plot_loss
        from .callbacks import FiniteGradients, Moves, Record, Save, StopSignals
        from .data_module import RunData
        from .lit import Diverged, Lit
        from .strategy import make_strategy

    quiet()
    first = ranks.world.rank == 0
    loggers = []
    if first:
        with atomic_write(folder / RUN) as temporary:
            record = {} if samples.vocabulary is None else {ENTRY: samples.vocabulary._asdict()}
            temporary.write_text(json.dumps(asdict(config) | record, indent=2, sort_keys=True) + "\n")
        loggers = make_loggers(config, folder)
    ratios = learning_ratios(method_of(config.adapter), config.adapter)
    if STATE in config.adapter.train_parts and not config.adapter.states_alone:
        ratios += ((TIME_STATE, train.state_lr / train.lr_init),)
    rates = family if train.layerwise_lr else None
    lit = Lit(model, train, step_of(train), plan.total_steps, plan.first_step, rates, ratios)
    accumulate = train.accumulate_grad_batches
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=train.devices,
        num_nodes=train.num_nodes,
        strategy=make_strategy(train, config.data.micro_bsz, trainable, live_parameters(model), accelerator, ranks),
        precision={"bf16": "bf16-true", "fp32": "32-true"}[train.precision],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=train.gradient_clip_val,
        max_epochs=1,
        logger=loggers,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[
            Moves(watch),
            FiniteGradients(accumulate),
            Record(folder, plan, accumulate, validator, examiners),
            Save(saver, plan, train, checkpoint, validator),
            StopSignals(say),
        ],
    )
    try:
        with telling_refusals(folder):
            trainer.fit(lit, datamodule=RunData(samples, plan, config.data.micro_bsz, accumulate))
    except Diverged as error:
        last = find_checkpoint(folder)
        say(
            f"error: {error}; the run stopped, and nothing of that step was saved. "
            + (f"The last good checkpoint is {last}" if last else "No checkpoint had been saved yet")
            + "; try a lower --lr_init, or --precision fp32",
            file=sys.stderr,
        )
        return (1 if first else 0), ""
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # what Lightning makes of a Ctrl-C between steps
            raise error.__context__ from None
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if not first:
        return 0, ""
    try:
        plot_loss(folder / METRICS, folder / "loss.png")
    except UserError as error:  # what was trained is saved
        say(f"note: {error}; --resume auto draws it again", file=sys.stderr)
    if lit.stopping and lit.step < plan.total_steps:
        return 128 + (lit.stop_requested or signal.SIGTERM), (
            f"stopped after {lit.step:,} of {counted(plan.total_steps, 'step')}, saved in {folder}; "
            "the same command with --resume goes on"
        )
    validation = ""
    if validator is not None:
        validation = f"validation  lowest loss {validator.best:.4f}"
        if validator.exhausted:
            validation += f"; stopped after {counted(train.early_stop, 'validation')} without a lower one"
        validation += "\n"
    return 0, f"{validation}finished  {saver.newest}, {folder / 'loss.png'}, {folder / METRICS}"
