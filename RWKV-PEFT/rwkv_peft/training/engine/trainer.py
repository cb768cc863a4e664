"""Make Lightning's Trainer for a run, and the module that it trains.

A step does, in this order, for each of its micro batches:

    RunCallback.on_train_batch_start    start the clock, and request a save if --save_minutes have passed
    Lit.on_train_batch_start            set the learning rate, and seed random numbers
    Lit.training_step                   sample completions if the data is prompts; compute the loss, and start
                                        its sum over all ranks
    DeepSpeedEngine.backward            compute gradients, and add them up
    Lit.on_after_backward               read that sum, and stop the run if it is not finite
    DeepSpeedEngine.step                after the last micro batch: sum over ranks, clip, the optimizer's step
    RunCallback.on_train_batch_end      after the last micro batch, and in this order:
    RunCallback.gradient_norm               stop the run if it is not finite; then measure losses, if it is time
    RunCallback.examine                     run the exams, if it is time
    RunCallback.record                      write metrics.jsonl, and log
    RunCallback.show                        move the progress bar
    RunCallback.save                        save, if it is time; stop after the last step
    Lit.on_train_batch_end              count the step
"""

from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import islice
from typing import Any

import lightning.pytorch as pl

from ...data.batches import TrainBatch, TrainBatches
from ...data.recorded import find_tokenizer
from ...data.sources import settings_of
from ...objectives.draws import Draws
from ...objectives.grpo import GRPO
from ...objectives.next_token import NextToken
from ..rates import group_rates
from ..rollout import PromptPlan, RolloutSettings, RolloutStep
from ..step.context_parallel import Line, SharedRows
from ..step.lit import Lit
from ..step.segments import Segments
from ..step.shared_prefix import Contexts, saved_tokens
from ..step.steps import Step, Whole
from ..turns import EpisodeSampler, TurnSettings
from .callbacks import RunCallback
from .prepared import Prepared
from .strategy import devices_here, make_strategy


def step_of(run: Prepared) -> Step:
    """The Step of a run."""
    config, teacher = run.config, run.teacher
    train, data, objective = config.train, config.data, config.objective
    if data.of_prompts:
        return rollout_step(run)
    if train.context_parallel > 1:
        limit = timedelta(minutes=train.timeout_minutes)
        line = Line(run.world.rank, train.context_parallel, config.model.n_layer, limit)
        return SharedRows(objective, line, teacher, train.chunk_ctx)
    if train.chunk_ctx:
        assert isinstance(objective, NextToken)  # the rules of the others refuse segments
        return Segments(train.chunk_ctx, train.stage == 3, objective)
    # ranks that gather each other's weights enter a model together, and each would read other contexts anew
    cached = data.of_contexts and (teacher is not None or train.stage != 3)
    return Whole(
        objective,
        group=data.documents if saved_tokens(config, run.samples, run.accelerator) else 0,
        teacher=teacher,
        contexts=Contexts() if cached else None,
    )


def rollout_step(run: Prepared) -> Step:
    """The Step of --data_type prompts: the model samples completions, and learns from them."""
    config, objective, data = run.config, run.config.objective, run.config.data
    assert isinstance(objective, Draws)  # because others do not take prompts
    settings = RolloutSettings.of(
        config, objective, find_tokenizer(None, config.model.vocab_size, run.samples.vocabulary)
    )
    prompts = PromptPlan(data.micro_bsz, data.micro_bsz * run.world.size, config.train.accumulate_grad_batches)
    episodes = None
    if run.environments is not None and isinstance(objective, GRPO):
        longest, turn_tokens = data.max_completion_length, objective.turn_tokens or data.max_completion_length
        limits = objective.max_turns, turn_tokens, longest
        turns = TurnSettings(settings.sampling, *limits, settings.stop, settings.batch)
        episodes = EpisodeSampler(run.environments, turns, settings_of(data), data.ctx_len)
    return RolloutStep(objective, settings, run.rewards, run.teacher, data.num_generations, prompts, episodes)


class RunBatches:
    """The micro batches that a rank has not seen yet; Lightning prefetches none of an iterable with a length."""

    def __init__(self, run: Prepared) -> None:
        train, plan = run.config.train, run.plan
        self.length = (plan.total_steps - plan.first_step) * train.accumulate_grad_batches
        self.batches = TrainBatches(
            run.samples,
            run.config.data.micro_bsz,
            group=run.world.rank // train.context_parallel,
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
    """The LightningModule that trains a run's model."""
    train, plan = run.config.train, run.plan
    return Lit(run.model, train, step_of(run), plan.total_steps, plan.first_step, *group_rates(run.config))


def make_trainer(run: Prepared, loggers: list[Any], say: Callable[..., object]) -> pl.Trainer:
    """Lightning's Trainer of a run; `say` is print, or silent on other ranks than 0."""
    train = run.config.train
    return pl.Trainer(
        accelerator=run.accelerator,
        devices=devices_here(run),
        num_nodes=train.num_nodes,
        strategy=make_strategy(run),
        precision={"bf16": "bf16-true", "fp16": "16-true", "fp32": "32-true"}[train.precision],
        accumulate_grad_batches=train.accumulate_grad_batches,
        gradient_clip_val=train.gradient_clip_val,
        max_epochs=1,
        logger=loggers,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.folder,
        callbacks=[RunCallback(run, say)],
    )
