"""A run that is ready to begin: its model, its data, and all that it measures and writes."""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ..cli.names import FORGETTING, FORGETTING_PICTURE
from ..config import RunConfig
from ..data.recorded import find_tokenizer
from ..data.row_settings import settings_of
from ..models.parts import LanguageModel
from ..objectives.draws import Draws
from ..objectives.grpo import GRPO
from ..objectives.next_token import NextToken
from ..rewards import Judges
from .bounding import Bound
from .engine import Plain, TrainingEngine
from .inputs import Inputs
from .measuring import BeforeAfter, Examiner, Questions, Validator
from .ranks.world import World
from .rollout import PromptPlan, RolloutLog, RolloutSettings, RolloutStep
from .saving.checkpoints import ANSWERS, ROWS
from .saving.loggers import Tracker
from .saving.saver import Saver
from .step.context_parallel import Line, SharedRows
from .step.segments import Segments
from .step.shared_prefix import Contexts, saved_tokens
from .step.steps import Step, Whole
from .step.teacher import make_teacher
from .turns import EpisodeSampler, TurnSettings


class TrainingRun:
    """A run that is ready to begin; loop.py trains it.

    Its inputs, its questions, its model, the rewards and environments that it learns from, if any, and this process's
    device and place among the ranks. From these it makes

    - the teacher's model, if it learns from one
    - compute: the Step that gives a batch's loss, and engine: it moves the weights
    - validator (None without data to measure), examiners, and rows to be answered before and after training, or None
    - bound: of --forget_at_most, or None
    - saver: None unless the run `saves`

    trackers get the numbers of each step. shows_progress: the first rank prints a bar. `leads` is true in rank 0, which
    writes the files and prints.
    """

    def __init__(
        self,
        inputs: Inputs,
        questions: Questions,
        model: LanguageModel,
        judges: Judges,
        device: torch.device,
        world: World,
        *,
        saves: bool = True,
        shows_progress: bool = True,
    ) -> None:
        config, plan = inputs.config, inputs.plan
        self.inputs, self.model = inputs, model
        self.teacher = None if inputs.teacher is None else make_teacher(inputs.teacher, config, device)
        self.rewards, self.environments = judges
        self.device, self.accelerator = device, "cpu" if device.type == "cpu" else "gpu"
        self.world, self.leads, self.shows_progress = world, world.rank == 0, shows_progress
        self.config, self.plan, self.samples, self.folder = config, plan, inputs.samples, inputs.folder
        self.trackers: Sequence[Tracker] = ()
        self.compute = make_step(self)
        self.engine = make_engine(model, self.compute, config, world, device)
        self.saver = Saver(inputs.folder, config, plan, inputs.identity, inputs.base) if saves else None
        train, anew = config.train, inputs.state is None
        self.validator = Validator(inputs, self.saver) if inputs.measured else None
        self.bound = None
        if train.forget_at_most is not None:
            assert self.validator is not None  # because there is --retain_data
            files = self.folder / FORGETTING, self.folder / FORGETTING_PICTURE
            self.bound = Bound(self.validator, self.saver, train.forget_at_most, *files)
        self.examiners: list[Any] = []
        if questions.exam is not None:
            self.examiners.append(Examiner(questions.exam, self.folder / ANSWERS, train, plan))
        if config.data.of_prompts:
            self.examiners.append(RolloutLog(self.folder / ANSWERS, plan))
        self.rows = None
        if questions.rows is not None:
            self.rows = BeforeAfter(questions.rows, self.folder / ROWS, train.compile, anew)
        # with --fresh_optimizer its optimizer's state may belong to other ranks
        self.checkpoint: Path | None = None if train.fresh_optimizer else inputs.checkpoint

    @property
    def exhausted(self) -> bool:
        """True if --early_stop ends the run."""
        return self.validator is not None and self.validator.exhausted

    def ends(self, done: int) -> bool:
        """True if the run is over after `done` steps."""
        return done == self.plan.total_steps or self.exhausted


def make_engine(
    model: LanguageModel, compute: Step, config: RunConfig, world: World, device: torch.device
) -> TrainingEngine:
    """The engine of a run: Zero if ranks share the work, or with ZeRO-3 or offload; else Plain, without DeepSpeed."""
    if not config.train.uses_zero:
        return Plain(model, compute, config, world, device)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed, when it is imported, would use a GPU if there is one
    from .zero import Zero

    return Zero(model, compute, config, world, device)


def make_step(run: TrainingRun) -> Step:
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


def rollout_step(run: TrainingRun) -> Step:
    """The Step of --data_type prompts: the model samples completions and learns from them."""
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
