"""The parts of a run that is ready to begin."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...config import RunConfig
from ...data.samples import Samples
from ...models.family import Family
from ...models.parts import LanguageModel
from ...rewards import Rewards
from ..measuring.before_after import BeforeAfter
from ..measuring.examiner import Examiner
from ..measuring.validate import Validator
from ..ranks.meeting import Ranks
from ..ranks.watch import Watch
from ..saving.saver import Saver
from ..step.plan import Plan
from ..step.stored import StoredTeacher
from ..step.teacher import Teacher


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to begin, on Ranks that have met.

    trainable: the number of parameters that train; validator: None without data to measure; rows: those to be
    answered before and after training, or None; teacher: the model that it learns from, or None; stored: what one
    said before, or None; rewards: what judges answers that the model draws, or None; checkpoint: the one to go on
    from, or None; accelerator: "cpu" or "gpu".
    """

    config: RunConfig
    family: Family
    model: LanguageModel
    trainable: int
    samples: Samples
    validator: Validator | None
    examiners: Sequence[Examiner]
    rows: BeforeAfter | None
    saver: Saver
    teacher: Teacher | None
    stored: StoredTeacher | None
    rewards: Rewards | None
    checkpoint: Path | None
    accelerator: str
    ranks: Ranks

    @property
    def folder(self) -> Path:
        return self.saver.folder

    @property
    def plan(self) -> Plan:
        return self.saver.plan

    @property
    def watch(self) -> Watch:
        assert self.ranks.watch is not None  # because they have met
        return self.ranks.watch

    @property
    def leads(self) -> bool:
        """Tell whether this process writes the files and prints: rank 0 does."""
        return self.ranks.world.rank == 0
