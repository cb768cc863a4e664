"""Tasks of EleutherAI's lm-evaluation-harness, for `rwkv-peft eval` and as an exam while training.

This is the only file that imports the package lm_eval, which takes seconds: import it only where it is needed.
"""

import difflib
import io
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from importlib.metadata import version
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable as plain
from lm_eval.utils import make_table
from tqdm import tqdm

from ..cli.errors import UserError, bar_seconds, quoted, summarize
from ..cli.names import is_finite, is_number
from ..config import TrainConfig
from ..data.tokenizer import Tokenizer
from ..inference.loading import Subject
from ..inference.prompts import encode
from ..inference.settings import Sampling
from .questions import GREEDY, Judgement, Record, digest_of, sample
from .scoring import score_pairs

SCORED, ROLLING, GENERATED = "loglikelihood", "loglikelihood_rolling", "generate_until"  # lm_eval's kinds of requests
MAX_TOKENS = 256  # lm_eval's default for a task that names no length
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts
SAMPLES = ("do_sample", "temperature", "top_p", "top_k")
NEUTRAL = (("num_beams", 1),)  # settings that change nothing here
SEED = 1234  # lm_eval's default seed of the few-shot examples, of NumPy and of torch
DRAWS = 100_000  # bootstrap draws for standard errors that have no formula: lm_eval's default
DRAWS_OF_RUN = 1000  # the same while training
KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better", "lm_eval")
SHOWN = 8  # tasks whose scores get a line while training

Response = tuple[float, bool] | float | str  # to SCORED, ROLLING, GENERATED
# the empty responses of a rehearsal
EMPTY: tuple[tuple[str, Response], ...] = ((SCORED, (-1.0, False)), (ROLLING, -1.0), (GENERATED, ""))
Results = dict[str, Any]
Respond = Callable[[str, Sequence[Any]], list[Response]]


class Question(NamedTuple):
    """A request in tokens: a context (token ids, not empty), and to score a continuation (token ids), or to generate a
    Sampling, the most tokens, and stop texts."""

    context: list[int]
    continuation: list[int]
    sampling: Sampling = GREEDY
    length: int = 0
    stops: tuple[str, ...] = ()


def question(kind: str, arguments: Sequence[Any], tokenizer: Tokenizer, number: int) -> Question:
    """The Question of lm_eval's request of a kind with these arguments. Raises UserError for arguments that are no
    text, unsupported settings, and an empty context if no token of the tokenizer starts a document."""
    texts = arguments[:1] if kind == GENERATED else arguments
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise UserError(f"a task asks about {quoted(wrong[0])}, and a text is due (doc_to_text, doc_to_target)")
    if kind == SCORED:
        return Question(*in_two(tokenizer, *arguments))
    if kind == ROLLING:
        return Question(encode(tokenizer, "", number), tokenizer.encode(arguments[0]))
    context, settings = arguments
    return Question(encode(tokenizer, context, number), [], *generation_of(settings), stops_of_request(settings))


def in_two(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encode a context and its continuation as lm_eval does -> the tokens of each.

    Space at the end of the context belongs to the continuation, and an empty context is the token that starts a
    document. Unlike in lm_eval, if a token of the whole text crosses the border, each part is encoded by itself, so
    that both are read in full.
    """
    text = context.rstrip()
    continuation = context[len(text) :] + continuation
    before, whole = tokenizer.encode(text), tokenizer.encode(text + continuation)
    if whole[: len(before)] != before:
        return before, tokenizer.encode(continuation)
    return before or encode(tokenizer, "", 0), whole[len(before) :]


def generation_of(settings: Mapping[str, Any]) -> tuple[Sampling, int]:
    """The Sampling and the most tokens of a task's generation_kwargs. Greedy unless a temperature above 0 is named and
    do_sample is not false. Raises UserError for unsupported settings."""
    for name, value in settings.items():
        if name not in ("until", *LENGTHS, *SAMPLES) and (name, value) not in NEUTRAL:
            raise UserError(f"a task asks for {name} {value!r} in its generation_kwargs, which is not offered here")
    length = next((int(settings[name]) for name in LENGTHS if settings.get(name) is not None), MAX_TOKENS)
    temperature = float(settings.get("temperature") or 0.0)
    if not settings.get("do_sample", temperature > 0) or temperature == 0:
        return GREEDY, length
    top_p, top_k = settings.get("top_p", 1.0), settings.get("top_k", 0)
    return Sampling(temperature=temperature, top_p=float(top_p), top_k=int(top_k)), length


def stops_of_request(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The stop texts of a task's answers, without empty ones, which would end an answer before it began. Raises
    UserError for anything but texts."""
    until = settings.get("until") or ()
    if not (isinstance(until, str) or isinstance(until, list) and all(isinstance(text, str) for text in until)):
        raise UserError(f"a task's answers end at {quoted(until)} (until), and a text is due, or a list of texts")
    return tuple(filter(None, [until] if isinstance(until, str) else until))


def responses(subject: Subject, kind: str, questions: Sequence[Question], batch: int) -> Iterator[tuple[int, Response]]:
    """Yield (place, response) of each Question of one kind as it is found, about `batch` sequences at a time. No text
    is cut, because a state holds any length."""
    if kind != GENERATED:
        pairs = [(question.context, question.continuation) for question in questions]
        for place, score in score_pairs(subject.model, pairs, batch, subject.start):
            yield place, score.logprob if kind == ROLLING else (score.logprob, score.greedy)
        return
    alike: dict[tuple[Sampling, int], list[int]] = {}
    for place, question in enumerate(questions):
        alike.setdefault((question.sampling, question.length), []).append(place)
    for (sampling, length), places in alike.items():
        contexts, stops = (
            {number: getattr(questions[place], name) for number, place in enumerate(places)}
            for name in ("context", "stops")
        )
        for found in sample(subject, contexts, stops, sampling, length, batch):
            yield places[found.number], found.text


def share_of_rank(questions: Sequence[Question], rank: int, ranks: int) -> list[int]:
    """The places of one rank's Questions. Questions with the same context stay together."""
    contexts: dict[tuple[int, ...], int] = {}
    of = [contexts.setdefault(tuple(question.context), len(contexts)) for question in questions]
    return [place for place, context in enumerate(of) if context % ranks == rank]


class Respondent(LM):
    """A model to lm_eval, which hands requests to respond(kind, requests) -> their responses, in order."""

    def __init__(self, respond: Respond) -> None:
        super().__init__()
        self.respond = respond

    def loglikelihood(self, requests: list[Any]) -> Any:
        return self.respond(SCORED, requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> Any:
        return self.respond(ROLLING, requests)

    def generate_until(self, requests: list[Any]) -> Any:
        return self.respond(GENERATED, requests)


class Tasks(TaskManager):
    """The tasks of lm_eval and of a folder, which a flag names; `alone` leaves out lm_eval's own, which take half a
    minute to read. Each list of tasks is loaded once; a failure is a UserError."""

    def __init__(self, folder: str | None, flag: str, alone: bool = False) -> None:
        super().__init__(include_path=folder, include_defaults=not alone)
        self.flag = flag
        self.loaded: dict[tuple[str, ...], Any] = {}

    def suffice_for(self, name: str) -> bool:
        """True if a name is one of these tasks, or a group of such tasks alone."""
        entry, tasks = self.task_index.get(name), self.all_subtasks
        members = entry.cfg.get("task") if entry is not None and entry.cfg else None
        return name in tasks or (isinstance(members, list) and all(member in tasks for member in members))

    def described(self, names: Sequence[str]) -> str:
        """Names of tasks, each with the file that defines it, for a message."""
        entries = [self.task_index.get(name) for name in names]
        files = [f" ({entry.yaml_path})" if entry is not None and entry.yaml_path else "" for entry in entries]
        return ", ".join(f"{name}{file}" for name, file in zip(names, files))

    def load(self, task_list: Any) -> Any:
        names = tuple(task_list)
        if names not in self.loaded:
            try:
                self.loaded[names] = super().load(list(names))
            except Exception as error:  # a task's file, code and data may raise anything
                raise UserError(unloadable(self.described(names), error, self.flag)) from error
        for name, task in self.loaded[names]["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(f"{name} runs code that the model writes, which is not offered here")
            if getattr(task, "MULTIMODAL", False):
                raise UserError(f"{name} shows pictures or sounds, which an RWKV model does not take")
        return self.loaded[names]


def unloadable(listed: str, error: Exception, flag: str) -> str:
    """The message on tasks that could not be loaded; flag is the one for a folder of tasks."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if kinds & {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        return (
            f"the data of {listed} is not on this disk, and the Hugging Face hub cannot be reached "
            f"({summarize(error)}); run it once with a network (unset HF_HUB_OFFLINE), or give tasks over files of "
            f"your own with {flag}"
        )
    return f"{listed} cannot be loaded: {summarize(error, named=True)}"


def load_tasks(names: Sequence[str], folder: str | None, flag: str = "--include_path") -> tuple[Tasks, list[str]]:
    """Load the tasks of these names -> (the Tasks, the names of those loaded).

    A pattern such as mmlu_* stands for all tasks that match. lm_eval's own tasks are not indexed if the folder's
    suffice. Raises UserError for a name without a task, and for a task that cannot be loaded.
    """
    tasks = Tasks(folder, flag, alone=folder is not None)
    if not all(map(tasks.suffice_for, names)):
        tasks = Tasks(folder, flag)
    found: list[str] = []
    for name in names:
        matches = tasks.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, tasks.all_tasks, 3)
            where = f"in lm_eval or in {folder}" if folder else f"in lm_eval, and no {flag} with others"
            raise UserError(f"there is no task {name} {where}" + (f"; is it {' or '.join(near)}?" if near else ""))
        found += matches
    found = list(dict.fromkeys(found))
    tasks.load(found)
    return tasks, found


def evaluate(
    subject: Subject, tasks: Tasks, names: list[str], batch: int, num_fewshot: int | None, limit: int | None
) -> Results:
    """Run lm_eval's tasks on a model, with progress bars -> its results. Raises UserError if lm_eval or a task's code
    fails; failures of our own code are raised as they are."""
    answering = False

    def respond(kind: str, requests: Sequence[Any]) -> list[Response]:
        nonlocal answering
        answering = True
        asked = [question(kind, request.args, subject.tokenizer, number) for number, request in enumerate(requests)]
        unit = " answers" if kind == GENERATED else " continuations"
        steps = responses(subject, kind, asked, batch)
        found = tqdm(steps, total=len(asked), unit=unit, mininterval=bar_seconds(sys.stderr), dynamic_ncols=True)
        given = [response for _, response in sorted(found, key=itemgetter(0))]
        answering = False
        return given

    set_shots(tasks, names, num_fewshot)
    try:
        return run_tasks(tasks, names, respond, limit, samples=True)
    except Exception as error:  # lm_eval and a task's code may raise anything
        if answering or isinstance(error, UserError):
            raise
        raise UserError(f"{tasks.described(names)} cannot be asked: {summarize(error, named=True)}") from error


def set_shots(tasks: Tasks, names: Sequence[str], num_fewshot: int | None) -> None:
    """Set the number of few-shot examples, as simple_evaluate does (None: each task's own); 0 stays 0."""
    for task in tasks.load(names)["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:
            task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)


def run_tasks(
    tasks: Tasks, names: Sequence[str], respond: Respond, limit: int | None, draws: int = DRAWS, samples: bool = False
) -> Results:
    """Run lm_eval's tasks with the responses of respond(kind, requests) -> its results, with each question if
    `samples`.

    Its simple_evaluate with the default seeds has the same, but runs git for the commit of the current folder, and a
    repository's settings may name programs to run. Standard errors without a formula are bootstrapped
    with `draws` draws (0: left out).
    """
    loaded = tasks.load(names)
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)
    model = Respondent(respond)
    found: Results = evaluator.evaluate(model, loaded, limit=limit, bootstrap_iters=draws, log_samples=samples)
    return found | {"lm_eval": version("lm_eval")}


@contextmanager
def silent() -> Iterator[None]:
    """Within, nothing is printed; on exit the random states of Python, NumPy and torch are as before."""
    numbers, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(arrays)


def tables(results: Results) -> str:
    """lm_eval's tables of tasks and of groups."""
    groups = [make_table(results, "groups")] if results.get("groups") else []
    return "\n".join([make_table(results), *groups])


class Measure(NamedTuple):
    """A task's value by one of its metrics, named with its filter, if any ("exact_match,strict-match"), and its
    standard error (None: unknown)."""

    task: str
    name: str
    value: float
    error: float | None

    def __str__(self) -> str:
        spread = f" ± {self.error:#.4g}" if self.error is not None else ""
        return f"{self.name.replace(',', ' by ')} {self.value:#.4g}{spread}"


class HarnessExam:
    """The questions of the tasks of --lm_eval, --eval_limit of each at most, in the tokens of a tokenizer.

    lm_eval runs once before training with empty responses, to collect the questions and to detect tasks that fail.
    Only a process that `speaks` shows lm_eval's bars while the tasks are loaded. Raises UserError for unknown tasks,
    tasks that cannot be loaded, and questions that cannot be put.
    """

    def __init__(self, train: TrainConfig, tokenizer: Tokenizer, speaks: bool = True) -> None:
        # a process forked for the bootstrap would copy a run's threads and signal handlers
        os.environ["DISABLE_MULTIPROC"] = "1"
        self.tokenizer, self.batch, self.limit = tokenizer, train.eval_batch, train.eval_limit or None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that a task relies on
        folder = train.lm_eval_include_path or None
        with nullcontext() if speaks else silent():
            self.tasks, self.names = load_tasks(train.lm_eval, folder, "--lm_eval_include_path")
        set_shots(self.tasks, self.names, train.lm_eval_num_fewshot)
        self.asked: dict[str, list[Question]] = {}
        try:
            results = self.results(self.collect)
            empty = dict(EMPTY)
            self.score([{"answer": empty[kind]} for kind, questions in self.asked.items() for _ in questions])
        except UserError:
            raise
        except Exception as error:  # a task's code may raise anything
            asked = self.tasks.described(self.names)
            raise UserError(f"--lm_eval {asked} cannot be asked: {summarize(error, named=True)}") from error
        self.size = sum(count["effective"] for count in results["n-samples"].values())

    def __len__(self) -> int:
        return self.size

    @property
    def digest(self) -> str:
        return digest_of(self.asked)

    def results(self, respond: Respond, draws: int = 0) -> dict[str, Any]:
        """Run lm_eval with the responses of respond(kind, requests) -> its results as plain JSON, their standard errors
        from `draws` draws; nothing is printed."""
        with silent():
            return json.loads(json.dumps(run_tasks(self.tasks, self.names, respond, self.limit, draws), default=plain))

    def collect(self, kind: str, requests: Sequence[Any]) -> list[Response]:
        """Keep the requests of a kind -> empty responses."""
        self.asked[kind] = self.questions(kind, requests)
        return [dict(EMPTY)[kind]] * len(requests)

    def questions(self, kind: str, requests: Sequence[Any]) -> list[Question]:
        return [question(kind, request.args, self.tokenizer, number) for number, request in enumerate(requests)]

    def ask(self, model: Any, rank: int = 0, ranks: int = 1) -> Iterator[Record]:
        """Yield a Record {"number", "answer"} of each of this rank's questions. The model starts from the states that
        it tunes, if any; its mode (train or eval) and its weights stay as they are."""
        subject, first = Subject(model, model.tuned_states(), self.tokenizer), 0
        for kind, questions in self.asked.items():
            mine = share_of_rank(questions, rank, ranks)
            for place, response in responses(subject, kind, [questions[number] for number in mine], self.batch):
                yield {"number": first + mine[place], "answer": response}
            first += len(questions)

    def score(self, records: Sequence[Record]) -> Judgement:
        """Score all records, in the order of their numbers. Raises UserError if a task has other questions than
        before."""
        given = iter([record["answer"] for record in records])

        def respond(kind: str, requests: Sequence[Any]) -> list[Response]:
            if self.questions(kind, requests) != self.asked.get(kind):
                raise UserError(
                    f"--lm_eval {' '.join(self.names)}: a task asks other questions each time, and no two "
                    "scores of it could be compared; leave it out"
                )
            return [next(given) for _ in requests]

        results = self.results(respond, DRAWS_OF_RUN)
        found = list(measures(results))
        return Judgement(
            {f"lm_eval/{measure.task}/{measure.name.replace(',', '/')}": measure.value for measure in found},
            [{name: results[name] for name in KEPT if name in results}],
            words(results, found),
        )


def measures(results: Mapping[str, Any]) -> Iterator[Measure]:
    """Yield the Measures in lm_eval's results, groups of tasks first."""
    for task, found in (results.get("groups", {}) | results["results"]).items():
        for key, value in found.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and is_number(value):
                error = found.get(f"{metric}_stderr,{kind}")
                spread = float(error) if is_finite(error) else None
                yield Measure(task, metric if kind == "none" else key, float(value), spread)


def words(results: Mapping[str, Any], found: Sequence[Measure]) -> list[str]:
    """A line for each group, and for each task of a group without a score; after SHOWN lines the number of the rest."""
    within = {task for group in results.get("groups", ()) for task in results["group_subtasks"][group]}
    listed: dict[str, list[str]] = {}
    for measure in found:
        if measure.task not in within:
            listed.setdefault(measure.task, []).append(str(measure))
    lines = [f"lm_eval {task}: {', '.join(values)}" for task, values in listed.items()]
    more = [f"lm_eval: and {len(lines) - SHOWN} more tasks, in the run's folder"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more
