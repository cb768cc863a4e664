"""What a run is made of when it may begin."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import RunConfig
from ..data.samples import Samples
from ..models.family import Family
from ..models.parts import LanguageModel
from .before_after import BeforeAfter
from .examiner import Examiner
from .meeting import Ranks
from .plan import Plan
from .saver import Saver
from .validate import Validator
from .watch import Watch


@dataclass(frozen=True)
class Prepared:
    """A run that may begin, on Ranks that have met.

    trainable: how many parameters of the model train; validator: None without data to measure; rows: those to be
    answered before and after, or None; checkpoint: the one to
    go on from, or None; accelerator: "cpu" or "gpu".
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
        assert self.ranks.watch is not None  # since they have met
        return self.ranks.watch

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return self.ranks.world.rank == 0
