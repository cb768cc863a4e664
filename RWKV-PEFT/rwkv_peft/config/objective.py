"""The interface of an objective: the loss that a training step minimizes. objectives/ has a file for each.

An objective is settings of a run, because its fields are flags. Other parts read it, and depend on no objective's name.
No file of an objective imports torch before a loss is computed, so that flags are judged without it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from ..cli.rules import Rule
from .train import AIM, AIM_OF_OTHERS, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

Head: TypeAlias = "Callable[[Tensor, Tensor], Any]"  # (x (B, T, C), weight of the model's head (V, C)) -> a result
Pass: TypeAlias = "Callable[[Head], Any]"  # a pass over a batch, which ends in a Head -> its result
Batch: TypeAlias = "Mapping[str, Tensor]"
Losses: TypeAlias = "tuple[Tensor, dict[str, Tensor]]"  # a loss, or that of each row; and figures by name
BASE = "base"  # a need: the log-probabilities of the model as it was before training
REWARDS = "rewards"  # a need: judges of the answers that the model draws
TEACHER = "teacher"  # a need: log-probabilities of another model, whose file `teacher` names
Exclusion = tuple[str, str, str]  # the others, why and remedy of a Rule (rules.py) of what an objective excludes
LOADED = "an adapter to start from"  # a fact that rules name
OWN_TEACHER = "a model that teaches itself (--data_type contexts without --teacher_model)"  # a fact that rules name
MEASURE = "answers are compared with what the base says of them, and"
WITHOUT = "leave it out, or take an --objective that does not ask the base"
OF_BASE: tuple[Exclusion, ...] = (
    ("--peft none", f"{MEASURE} this trains the base itself", WITHOUT),
    ("--train_parts", f"{MEASURE} these are parts of it that train", WITHOUT),
    (LOADED, f"{MEASURE} not of it", "merge it first"),
)


class Passes(NamedTuple):
    """Passes over a step's batch, for an objective to compute with: through the model, with gradients; and without,
    through the model as it was before training, and through its teacher. figures are those that the objective reported
    of all rows of the step before, on all ranks; {} in the first step. trains: False while the loss is only measured.
    """

    model: Pass
    base: Pass
    teacher: Pass
    figures: Mapping[str, float]
    trains: bool = True


def number_of_tokens(batch: Batch) -> "Tensor":
    """The number of a batch's tokens that count, or the sum of their weights, ()."""
    return batch["weights"].double().sum() if "weights" in batch else batch["mask"].sum()


class Figure(NamedTuple):
    """A number that an objective reports beside its loss, a mean over the same items: its key in metrics.jsonl, also
    its word in messages; in pictures its label, and the axis that it is drawn at, "" if it is not."""

    name: str
    label: str = ""
    axis: str = ""


@dataclass(frozen=True)
class Objective(ABC):
    """Settings and properties of an objective.

    - name: the value of --objective; text: its line in the help
    - rows: the values of --data_type that it learns from; a run of such data takes the first objective in the table
    - unit: what its loss is a mean over
    - needs: its inputs besides a pass through the model: BASE, TEACHER, REWARDS
    - excludes: the settings that it does not go with, besides those of OF_BASE if it needs the base
    - rules: further rules, on flags of its own
    - of_tokens: the loss is the mean cross-entropy of tokens, so that rows may be computed in segments, and methods
      compared
    - pace: its learning rate over that of next tokens, if none is given
    - figures: the numbers that it always reports
    - teacher: the file of the model that it learns from, if it needs a TEACHER and the model is not its own
    - reward, weights: what judges answers, and what each is multiplied by (() for 1), if it needs REWARDS;
      environments: the classes whose conversations they are, () for answers without tools
    """

    name: str = field(default="", init=False)  # of the class; a field, so that the files of a run tell it
    text: ClassVar[str]
    rows: ClassVar[tuple[str, ...]]
    unit: ClassVar[str] = "token"
    needs: ClassVar[tuple[str, ...]] = ()
    excludes: ClassVar[tuple[Exclusion, ...]] = ()
    rules: ClassVar[tuple[Rule, ...]] = ()
    of_tokens: ClassVar[bool] = False
    pace: ClassVar[float] = 1.0
    figures: ClassVar[tuple[Figure, ...]] = ()
    # without annotations, which would make them fields of every objective
    teacher = ""
    reward = tuple[str, ...]()
    weights = tuple[float, ...]()
    environments = tuple[str, ...]()

    @property
    def shown(self) -> tuple[Figure, ...]:
        """The figures of the progress bar."""
        return self.figures[:1]

    @property
    def aim(self) -> int:
        """The steps that a few rows are read for, unless flags say how often."""
        return AIM if self.of_tokens else AIM_OF_OTHERS

    @property
    def of_preferences(self) -> bool:
        """True if it learns which answers are better than others."""
        return not {"pairs", "labels"}.isdisjoint(self.rows)

    @property
    def asks_base(self) -> bool:
        """True if it needs the base's reference log-probabilities."""
        return BASE in self.needs

    def problems(self, train: TrainConfig) -> Iterator[str]:
        """Yield refusals of its settings beyond the table of rules."""
        yield from ()

    @property
    def together(self) -> int:
        """The number of steps that learn from the same answers, between which nothing is saved."""
        return 1

    @abstractmethod
    def loss(self, passes: Passes, batch: Batch, count: float) -> Losses:
        """A batch's loss (), the sum over its items divided by `count`, and its figures by name, divided alike."""

    @abstractmethod
    def items(self, batch: Batch) -> "Tensor":
        """The number of a batch's items that count, ()."""

    def describe(self) -> str:
        """A sentence for the header of a run on how a step changes the model; "" if that needs no word."""
        return ""
