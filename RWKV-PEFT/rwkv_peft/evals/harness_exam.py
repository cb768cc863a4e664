"""The tasks of the lm-evaluation-harness that a run puts to its model while it trains.

They are loaded and rehearsed before training begins: lm_eval runs once with empty answers, and its requests are noted.
In a round the model answers these on all ranks; lm_eval then runs again and is given the answers.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from ..config import TrainConfig
from ..data.tokenizer import Tokenizer
from ..errors import UserError, told
from ..generate.loading import Subject
from ..numeric import is_finite, is_number
from .aside import aside
from .exam import Judgement
from .records import Record, digest_of
from .requests import ROLLING, SCORED, WRITTEN, Answer, Question, answers, question, share

# the empty answers of the rehearsal
SILENCE: tuple[tuple[str, Answer], ...] = ((SCORED, (-1.0, False)), (ROLLING, -1.0), (WRITTEN, ""))
KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better", "lm_eval")
DRAWS = 1000  # bootstrap draws, for standard errors that have no formula
SHOWN = 8  # tasks whose scores get a line while training


class Measure(NamedTuple):
    """A task's value by one of its metrics, whose name includes the filter if it has one ("exact_match,strict-match"),
    and the standard error (None: unknown)."""

    task: str
    name: str
    value: float
    error: float | None

    def __str__(self) -> str:
        spread = f" ± {self.error:#.4g}" if self.error is not None else ""
        return f"{self.name.replace(',', ' by ')} {self.value:#.4g}{spread}"


class HarnessExam:
    """The questions of the tasks of --lm_eval, --eval_limit of each at most, in the tokens of a tokenizer. Only a
    process that `speaks` shows lm_eval's bars while the tasks are loaded. Raises UserError for unknown tasks, tasks
    that cannot be loaded, and questions that cannot be asked."""

    def __init__(self, train: TrainConfig, tokenizer: Tokenizer, speaks: bool = True) -> None:
        from .harness import load_tasks, set_shots

        self.tokenizer, self.batch, self.limit = tokenizer, train.eval_batch, train.eval_limit or None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that a task relies on
        folder = train.lm_eval_include_path or None
        with nullcontext() if speaks else aside():
            self.tasks, self.names = load_tasks(train.lm_eval, folder, "--lm_eval_include_path")
        set_shots(self.tasks, self.names, train.lm_eval_num_fewshot)
        self.asked: dict[str, list[Question]] = {}
        try:
            results = self.results(self.note)
            silence = dict(SILENCE)
            self.judge([{"answer": silence[kind]} for kind, questions in self.asked.items() for _ in questions])
        except UserError:
            raise
        except Exception as error:  # a task's code may raise anything
            asked = self.tasks.described(self.names)
            raise UserError(f"--lm_eval {asked} cannot be asked: {told(error, named=True)}") from error
        self.size = sum(count["effective"] for count in results["n-samples"].values())

    def __len__(self) -> int:
        return self.size

    @property
    def digest(self) -> str:
        return digest_of(self.asked)

    def results(self, respond: Any, draws: int = 0) -> dict[str, Any]:
        """Run lm_eval with the answers of respond(kind, requests) -> its results, their errors from `draws` draws."""
        from .harness import results_of

        return results_of(self.tasks, self.names, respond, self.limit, draws)

    def note(self, kind: str, requests: Sequence[Any]) -> list[Answer]:
        """Note the requests of a kind, and give empty answers."""
        self.asked[kind] = self.questions(kind, requests)
        return [dict(SILENCE)[kind]] * len(requests)

    def questions(self, kind: str, requests: Sequence[Any]) -> list[Question]:
        return [question(kind, request.args, self.tokenizer, number) for number, request in enumerate(requests)]

    def ask(self, model: Any, rank: int = 0, ranks: int = 1) -> Iterator[Record]:
        """Ask the model this rank's questions; yield a Record of each answer with its number as it is found. The model
        starts from the states that it tunes, if any; its mode (train or eval) and its weights stay as they are."""
        subject, first = Subject(model, model.tuned_states(), self.tokenizer), 0
        for kind, questions in self.asked.items():
            mine = share(questions, rank, ranks)
            for place, answer in answers(subject, kind, [questions[number] for number in mine], self.batch):
                yield {"number": first + mine[place], "answer": answer}
            first += len(questions)

    def judge(self, records: Sequence[Record]) -> Judgement:
        """Judge the records of all answers, in the order of their numbers. Raises UserError if a task asks other
        questions than in the rehearsal."""
        given = iter([record["answer"] for record in records])

        def respond(kind: str, requests: Sequence[Any]) -> list[Answer]:
            if self.questions(kind, requests) != self.asked.get(kind):
                raise UserError(
                    f"--lm_eval {' '.join(self.names)}: a task asks other questions each time, and no two "
                    "scores of it could be compared; leave it out"
                )
            return [next(given) for _ in requests]

        results = self.results(respond, DRAWS)
        found = list(measures(results))
        return Judgement(
            {f"lm_eval/{measure.task}/{measure.name.replace(',', '/')}": measure.value for measure in found},
            [{name: results[name] for name in KEPT if name in results}],
            words(results, found),
        )


def measures(results: Mapping[str, Any]) -> Iterator[Measure]:
    """Yield the Measures in lm_eval's results, those of groups of tasks first."""
    for task, found in (results.get("groups", {}) | results["results"]).items():
        for key, value in found.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and is_number(value):
                error = found.get(f"{metric}_stderr,{kind}")
                known = is_finite(error)
                yield Measure(task, metric if kind == "none" else key, float(value), float(error) if known else None)


def words(results: Mapping[str, Any], found: Sequence[Measure]) -> list[str]:
    """Write a line for each group, and each task whose group has no score; after SHOWN lines the number of the rest."""
    within = {task for group in results.get("groups", ()) for task in results["group_subtasks"][group]}
    told: dict[str, list[str]] = {}
    for measure in found:
        if measure.task not in within:
            told.setdefault(measure.task, []).append(str(measure))
    lines = [f"lm_eval {task}: {', '.join(values)}" for task, values in told.items()]
    more = [f"lm_eval: and {len(lines) - SHOWN} more tasks, in the run's folder"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more
