"""The questions that a run puts to its model while it trains. They are read and checked before training begins."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..config import TrainConfig
from ..generate.flags import unescaped
from ..generate.loading import Subject
from ..generate.prompts import encode
from ..tables import TASKS
from .asking import Manner, ask
from .records import Record, digest_of, share_of
from .task import layout_of, read_problems


class Judgement(NamedTuple):
    """The result of a round of questions: numbers for the run's metrics by name, records for the lines of a JSON file,
    and lines of text to print."""

    metrics: dict[str, float]
    lines: Sequence[Record]
    words: list[str]


class Exam:
    """The rows of --eval_data, --eval_limit of them at most, as problems of --eval_task. Raises UserError for rows that
    are none or that the tokenizer cannot encode, and if a package that the task needs is missing."""

    def __init__(self, train: TrainConfig, tokenizer: Any) -> None:
        self.task, self.tokenizer = TASKS[train.eval_task](), tokenizer
        self.task.require()
        self.manner = Manner(train.eval_max_tokens, train.eval_batch, [unescaped(text) for text in train.eval_stop])
        layout = layout_of(self.task, train.eval_template, "--eval_template")
        rows = f"[:{train.eval_limit}]" if train.eval_limit else ""
        self.problems = read_problems(self.task, train.eval_data, rows, layout)
        for number, problem in enumerate(self.problems):
            encode(tokenizer, problem.prompt, number)  # raises UserError for a prompt that cannot be asked

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def digest(self) -> str:
        return digest_of(self.problems)

    def ask(self, model: Any, rank: int = 0, ranks: int = 1) -> Iterator[Record]:
        """Ask the model every `ranks`-th problem from number `rank` on; yield each Record as it is done. The model
        starts from the states that it tunes, if any; its mode (train or eval) and its weights stay as they are."""
        due = {number: self.problems[number] for number in range(rank, len(self.problems), ranks)}
        return ask(self.manner, self.task, Subject(model, model.tuned_states(), self.tokenizer), due)

    def judge(self, records: Sequence[Record]) -> Judgement:
        """Judge all records. The score is the share that is right by the task's first measure."""
        strictest, *others = self.task.measures
        shares = {"score": share_of(strictest, records)}
        shares |= {name.replace(" ", "_"): share_of(name, records) for name in others}
        told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        return Judgement(
            {f"eval_{name}": share for name, share in shares.items()},
            records,
            [f"of {len(records):,} questions right: {told}"],
        )
