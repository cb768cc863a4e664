"""The parts of a run that is ready to begin; a module of its own, because Lightning is imported later."""

from typing import Any

from ...models.parts import LanguageModel
from ...rewards import Judges
from ..inputs import Inputs
from ..measuring import BeforeAfter, Examiner, Questions, Validator
from ..ranks.world import World
from ..rollout import RolloutLog
from ..saving.checkpoints import ANSWERS, ROWS
from ..saving.saver import Saver


class Prepared:
    """A run that is ready to begin.

    Its inputs, its questions, its model with the number of `trainable` parameters, and the teacher and the rewards
    that it learns from, if any; accelerator: "cpu" or "gpu". From these it makes the validator (None without data to
    measure), the examiners, the rows to be answered before and after training (or None), and the saver. `leads` is true
    in rank 0, which writes the files and prints.
    """

    def __init__(
        self,
        inputs: Inputs,
        asked: Questions,
        model: LanguageModel,
        trainable: int,
        teacher: LanguageModel | None,
        judges: Judges,
        accelerator: str,
        world: World,
    ) -> None:
        config, plan = inputs.config, inputs.plan
        self.inputs, self.model, self.trainable, self.teacher = inputs, model, trainable, teacher
        self.rewards, self.environments = judges
        self.accelerator, self.world, self.leads = accelerator, world, world.rank == 0
        self.config, self.plan, self.samples = config, plan, inputs.samples
        self.saver = Saver(inputs.folder, config, plan, inputs.identity, inputs.base)
        self.folder, train, anew = inputs.folder, config.train, inputs.state is None
        self.validator = None
        if inputs.measured:
            self.validator = Validator(inputs, self.saver)
        self.examiners: list[Any] = []
        if asked.exam is not None:
            self.examiners.append(Examiner(asked.exam, self.folder / ANSWERS, train, plan))
        if config.data.of_prompts:
            self.examiners.append(RolloutLog(self.folder / ANSWERS, plan))
        self.rows = None
        if asked.rows is not None:
            self.rows = BeforeAfter(asked.rows, self.folder / ROWS, train.compile, anew)
        # its optimizer's state may belong to other ranks
        self.checkpoint = None if train.fresh_optimizer else inputs.checkpoint

    @property
    def exhausted(self) -> bool:
        """True if --early_stop ends the run."""
        return self.validator is not None and self.validator.exhausted

    def ends(self, done: int) -> bool:
        """True if the run is over after `done` steps."""
        return done == self.plan.total_steps or self.exhausted
