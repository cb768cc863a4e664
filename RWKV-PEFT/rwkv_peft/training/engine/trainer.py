"""Make Lightning's Trainer for a run, and the module that it trains.

A step does, in this order, for each of its micro batches:

    Moves.on_train_batch_start              tell the watch of the step
    Record.on_train_batch_start             look at the clock
    Save.on_train_batch_start               ask for a save if --save_minutes have passed
    Lit.on_train_batch_start                set the learning rate, and seed the random draws
    Lit.training_step                       draw answers if the data is prompts; compute the loss, and start
                                            its sum over all ranks
    DeepSpeedEngine.backward                compute gradients, and add them up
    Lit.on_after_backward                   read that sum, and stop the run if it is not finite
    DeepSpeedEngine.step                    after the last micro batch: sum over ranks, clip, the optimizer's step
    Moves.on_train_batch_end                tell the watch that the step is done
    FiniteGradients.on_train_batch_end      stop the run if the gradient norm is not finite
    Record.on_train_batch_end               validate, ask questions, write metrics, draw the bar
    Save.on_train_batch_end                 save, if it is time; stop after the last step
    Lit.on_train_batch_end                  count the step
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as pl

from ...adapters.groups import learning_ratios
from ...adapters.methods import method_of
from ...cli.names import STATE
from ...config import RunConfig
from ...data.batches import TrainBatch, TrainBatches
from ...data.recorded import find_tokenizer
from ...data.samples import Samples
from ...models import family_named
from ...models.layout import TIME_STATE
from ...objectives.draws import Draws
from ...objectives.next_token import NextToken
from ..rollout import PromptPlan, RolloutSettings, RolloutStep
from ..step.contexts import Contexts
from ..step.forked import saved_tokens
from ..step.lit import Lit
from ..step.relay import Line
from ..step.shared import SharedRows, SharedSegments
from ..step.steps import Segments, Step, Whole
from ..step.stored import StoredTeacher
from ..step.teacher import Teacher
from .callbacks import FiniteGradients, Moves, Record, Save, StopSignals
from .prepared import Prepared
from .strategy import make_strategy


def step_of(run: Prepared) -> Step:
    """Choose the Step of a run."""
    if run.config.data.of_prompts:
        return drawn_step(run)
    if run.config.train.context_parallel > 1:
        return shared_step(run)
    return given_step(run.config, run.samples, run.accelerator, run.teacher, run.inputs.stored)


def drawn_step(run: Prepared) -> Step:
    """Choose the Step of a run whose model answers prompts itself."""
    config, objective, data = run.config, run.config.objective, run.config.data
    assert isinstance(objective, Draws)  # because others do not take prompts
    settings = RolloutSettings.of(
        config, objective, find_tokenizer(None, config.model.vocab_size, run.samples.vocabulary)
    )
    apart, end = data.micro_bsz * run.ranks.world.size, run.plan.total_steps * run.plan.step_samples
    prompts = PromptPlan(data.micro_bsz, apart, config.train.accumulate_grad_batches, end // objective.together)
    teacher = None if run.teacher is None else run.teacher.model
    return RolloutStep(objective, settings, run.rewards, teacher, data.num_generations, prompts, run.watch.moved)


def shared_step(run: Prepared) -> Step:
    """Choose the Step of a run whose ranks share rows."""
    train, objective = run.config.train, run.config.objective
    line = Line(run.ranks.world.rank, train.context_parallel, run.config.model.n_layer)
    if not train.chunk_ctx:
        return SharedRows(objective, line, None if run.teacher is None else run.teacher.model)
    assert isinstance(objective, NextToken)  # the rules of the others refuse segments
    return SharedSegments(train.chunk_ctx, line, objective)


def given_step(
    config: RunConfig,
    samples: Samples,
    accelerator: str,
    teacher: Teacher | None = None,
    stored: StoredTeacher | None = None,
) -> Step:
    """Choose the Step for batches that hold all that is learned: rows, those that share their prompt, or segments."""
    train, data, objective = config.train, config.data, config.objective
    if not train.chunk_ctx:
        group = data.documents if saved_tokens(config, samples, accelerator) else 0
        word, other = None if stored is None else stored.of, None if teacher is None else teacher.model
        # ranks that gather each other's weights enter a model together, and each would read other contexts anew
        apart = other is not None or "stage_3" not in train.strategy
        contexts = Contexts() if data.of_contexts and stored is None and apart else None
        return Whole(objective, group=group, teacher=other, stored=word, contexts=contexts)
    assert isinstance(objective, NextToken)  # the rules of the others refuse segments
    return Segments(train.chunk_ctx, train.bptt_segments, "stage_3" in train.strategy, objective)


class RunBatches:
    """The micro batches that a rank still has to see; Lightning fetches none ahead if it knows their number."""

    def __init__(self, run: Prepared) -> None:
        train, plan = run.config.train, run.plan
        self.length = (plan.total_steps - plan.first_step) * train.accumulate_grad_batches
        self.batches = TrainBatches(
            run.samples,
            run.config.data.micro_bsz,
            group=run.ranks.world.rank // train.context_parallel,
            groups=train.groups,
            accumulate=train.accumulate_grad_batches,
            samples_seen=plan.first_sample,
            pin_memory=run.accelerator == "gpu",
        )

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[TrainBatch]:
        return islice(self.batches, self.length)


def make_lit(run: Prepared) -> Lit:
    adapter, train, plan = run.config.adapter, run.config.train, run.plan
    family = family_named(run.config.model.version)
    ratios = learning_ratios(method_of(adapter), adapter)
    if STATE in adapter.train_parts and not adapter.states_alone:
        ratios += ((TIME_STATE, train.state_lr / train.lr_init),)
    rates = family if train.layerwise_lr else None
    return Lit(run.model, train, step_of(run), plan.total_steps, plan.first_step, rates, ratios)


def make_trainer(run: Prepared, loggers: list[Any], say: Callable[..., object]) -> pl.Trainer:
    train = run.config.train
    accumulate = train.accumulate_grad_batches
    return pl.Trainer(
        accelerator=run.accelerator,
        devices=train.devices,
        num_nodes=train.num_nodes,
        strategy=make_strategy(run),
        precision={"bf16": "bf16-true", "fp16": "16-true", "fp32": "32-true"}[train.precision],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=train.gradient_clip_val,
        max_epochs=1,
        logger=loggers,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.folder,
        callbacks=[Moves(run.watch), FiniteGradients(accumulate), Record(run), Save(run), StopSignals(say)],
    )
