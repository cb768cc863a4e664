"""Have EleutherAI's lm-evaluation-harness question a model and judge the answers, in a command or while training.

This is the only file that imports the package lm_eval: whoever needs it imports this file only then.
"""

import difflib
import io
import json
import logging
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from importlib.metadata import version
from operator import itemgetter
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table
from tqdm import tqdm

from ..cli.errors import UserError, quoted, told
from ..cli.numeric import is_finite, is_number
from ..cli.streams import bar_seconds
from ..config import TrainConfig
from ..data.tokenizer import Tokenizer
from ..inference.loading import Subject
from ..inference.prompts import encode
from ..inference.settings import Sampling
from .asking import GREEDY, score_pairs, write
from .exam import Judgement
from .records import Record, digest_of

SCORED, ROLLING, WRITTEN = "loglikelihood", "loglikelihood_rolling", "generate_until"  # lm_eval's kinds of requests
MAX_TOKENS = 256  # lm_eval's default for a task that names no length
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts
SAMPLES = ("do_sample", "temperature", "top_p", "top_k")
NEUTRAL = (("num_beams", 1),)  # settings that change nothing here
ALONE = "DISABLE_MULTIPROC"  # the environment variable that keeps lm_eval in one process
SEED = 1234  # lm_eval's default seed of the examples before a question, of NumPy and of torch
DRAWS, DRAWS_OF_RUN = (
    100_000,
    1000,
)  # bootstrap draws, for standard errors that have no formula: lm_eval's default; ours
KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better", "lm_eval")
SHOWN = 8  # tasks whose scores get a line while training

Answer = tuple[float, bool] | float | str  # to SCORED, ROLLING, WRITTEN
# the empty answers of a rehearsal
SILENCE: tuple[tuple[str, Answer], ...] = ((SCORED, (-1.0, False)), (ROLLING, -1.0), (WRITTEN, ""))
Results = dict[str, Any]
Respond = Callable[[str, Sequence[Any]], list[Answer]]


class Question(NamedTuple):
    """A request in tokens.

    context (token ids, not empty) is read first. A scored request has the continuation (token ids) whose probability is
    asked; a written one has the sampling, the length in tokens at most, and the texts that end the answer.
    """

    context: list[int]
    continuation: list[int]
    sampling: Sampling = GREEDY
    length: int = 0
    stops: tuple[str, ...] = ()


def question(kind: str, arguments: Sequence[Any], tokenizer: Tokenizer, number: int) -> Question:
    """Make the Question of lm_eval's request of a kind with these arguments. Raises UserError for arguments that are no
    text or settings that are not offered, and for an empty context if no token of the tokenizer starts a document."""
    texts = arguments[:1] if kind == WRITTEN else arguments
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise UserError(f"a task asks about {quoted(wrong[0])}, and a text is due (doc_to_text, doc_to_target)")
    if kind == SCORED:
        return Question(*in_two(tokenizer, *arguments))
    if kind == ROLLING:
        return Question(encode(tokenizer, "", number), tokenizer.encode(arguments[0]))
    context, settings = arguments
    return Question(encode(tokenizer, context, number), [], *manner(settings), stops_of_request(settings))


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


def manner(settings: Mapping[str, Any]) -> tuple[Sampling, int]:
    """Read from a task's settings how its answers are written -> (Sampling, the length in tokens at most). They are
    greedy unless the task names a temperature above 0 and does not say do_sample: false. Raises UserError for settings
    that are not offered."""
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
    """The texts that end an answer. An empty one is left out, because it would end the answer before it began. Raises
    UserError for anything but texts."""
    until = settings.get("until") or ()
    if not (isinstance(until, str) or isinstance(until, list) and all(isinstance(text, str) for text in until)):
        raise UserError(f"a task's answers end at {quoted(until)} (until), and a text is due, or a list of texts")
    return tuple(filter(None, [until] if isinstance(until, str) else until))


def answers(subject: Subject, kind: str, questions: Sequence[Question], batch: int) -> Iterator[tuple[int, Answer]]:
    """Yield (place, answer) of each Question of one kind as it is found, about `batch` sequences at a time.

    In a batch that is scored, a context with several continuations is read once, and so is a long opening that all
    contexts share. No text is cut, because a state holds any length.
    """
    if kind != WRITTEN:
        pairs = [(question.context, question.continuation) for question in questions]
        for place, score in score_pairs(subject.model, pairs, batch, subject.start):
            yield place, score.logprob if kind == ROLLING else (score.logprob, score.greedy)
        return
    alike: dict[tuple[Sampling, int], list[int]] = {}
    for place, question in enumerate(questions):
        alike.setdefault((question.sampling, question.length), []).append(place)
    for (sampling, length), places in alike.items():
        contexts, stops = zip(*((questions[place].context, questions[place].stops) for place in places))
        for number, answer in write(subject, contexts, stops, sampling, length, batch):
            yield places[number], answer.text


def share(questions: Sequence[Question], rank: int, ranks: int) -> list[int]:
    """The places of the Questions that one of several ranks answers. Questions with the same context stay together."""
    contexts: dict[tuple[int, ...], int] = {}
    of = [contexts.setdefault(tuple(question.context), len(contexts)) for question in questions]
    return [place for place, context in enumerate(of) if context % ranks == rank]


class Respondent(LM):
    """The model that lm_eval sees, which hands requests to respond(kind, requests) -> their answers, in order."""

    def __init__(self, respond: Respond) -> None:
        super().__init__()
        self.respond = respond

    def loglikelihood(self, requests: list[Any]) -> Any:
        return self.respond(SCORED, requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> Any:
        return self.respond(ROLLING, requests)

    def generate_until(self, requests: list[Any]) -> Any:
        return self.respond(WRITTEN, requests)


class Tasks(TaskManager):
    """The tasks of lm_eval and of a folder. Each list of tasks is loaded once; a failure is a UserError."""

    def __init__(self, folder: str | None, flag: str, alone: bool = False) -> None:
        """Index the tasks. flag is the one that names the folder; alone leaves out lm_eval's own tasks, whose files
        take half a minute to read."""
        super().__init__(include_path=folder, include_defaults=not alone)
        self.flag = flag
        self.loaded: dict[tuple[str, ...], Any] = {}

    def suffice_for(self, name: str) -> bool:
        """Tell whether a name is that of one of these tasks, or of a group that has only such tasks."""
        entry, known = self.task_index.get(name), self.all_subtasks
        members = entry.cfg.get("task") if entry is not None and entry.cfg else None
        return name in known or (isinstance(members, list) and all(member in known for member in members))

    def described(self, names: Sequence[str]) -> str:
        """Write names of tasks, each with the file that defines it, for a message."""
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
    """Say in words why the listed tasks could not be loaded; flag is the one that names a folder of tasks."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if kinds & {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        return (
            f"the data of {listed} is not on this disk, and the Hugging Face hub cannot be reached "
            f"({told(error)}); run it once with a network (unset HF_HUB_OFFLINE), or give tasks over files of your own "
            f"with {flag}"
        )
    return f"{listed} cannot be loaded: {told(error, named=True)}"


def load_tasks(names: Sequence[str], folder: str | None, flag: str = "--include_path") -> tuple[Tasks, list[str]]:
    """Load the tasks of these names -> (the Tasks, the names of those loaded).

    A pattern such as mmlu_* stands for all tasks that match. Those of a folder, which a flag names, are there too;
    lm_eval's own are not indexed if the folder's suffice. Raises UserError for a name without a task, and for a task
    that cannot be loaded.
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
    fails; failures of our own answering are raised as they are."""
    answering = False

    def respond(kind: str, requests: Sequence[Any]) -> list[Answer]:
        nonlocal answering
        answering = True
        asked = [question(kind, request.args, subject.tokenizer, number) for number, request in enumerate(requests)]
        unit = " answers" if kind == WRITTEN else " continuations"
        every = bar_seconds(sys.stderr)
        steps = answers(subject, kind, asked, batch)
        found = tqdm(steps, total=len(asked), unit=unit, mininterval=every, dynamic_ncols=True)
        given = [answer for _, answer in sorted(found, key=itemgetter(0))]
        answering = False
        return given

    set_shots(tasks, names, num_fewshot)
    try:
        return run(tasks, names, respond, limit, samples=True)
    except Exception as error:  # lm_eval and a task's code may raise anything; our own answering's is a bug
        if answering or isinstance(error, UserError):
            raise
        raise UserError(f"{tasks.described(names)} cannot be asked: {told(error, named=True)}") from error


def set_shots(tasks: Tasks, names: Sequence[str], num_fewshot: int | None) -> None:
    """Set the number of examples before a question, as simple_evaluate does (None: each task's own); 0 stays 0."""
    for task in tasks.load(names)["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:
            task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)


def run(
    tasks: Tasks, names: Sequence[str], respond: Respond, limit: int | None, draws: int = DRAWS, samples: bool = False
) -> Results:
    """Run lm_eval's tasks with the answers of respond(kind, requests) -> its results, with each question if `samples`.

    They are those of its simple_evaluate with the default seeds, but no facts about the machine are collected, and git
    is not asked for the commit of the current folder, whose settings may name programs to run. Standard errors without
    a formula are bootstrapped with `draws` draws (0: left out).
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


class OtherThreads(io.TextIOBase):
    """A stream that drops what its maker's thread writes, and passes on what others do, such as a watch over a run."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.silent = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.silent else self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


@contextmanager
def aside() -> Iterator[None]:
    """Within, this thread prints nothing; on exit the random states of Python, NumPy and torch are as before."""
    numbers, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with (
            torch.random.fork_rng(devices),
            redirect_stdout(OtherThreads(sys.stdout)),
            redirect_stderr(OtherThreads(sys.stderr)),
        ):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(arrays)


def tables(results: Results) -> str:
    """Write lm_eval's tables of tasks and of groups."""
    found = [make_table(results)]
    if results.get("groups"):
        found.append(make_table(results, "groups"))
    return "\n".join(found)


def plain(value: object) -> object:
    """Convert a value that JSON cannot hold, as lm_eval does."""
    return handle_non_serializable(value)


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
        os.environ[ALONE] = "1"  # a process forked for the bootstrap would copy a run's threads and signal handlers
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
        """Run lm_eval with the answers of respond(kind, requests) -> its results as plain JSON, their standard errors
        from `draws` draws; nothing is printed."""
        with aside():
            return json.loads(json.dumps(run(self.tasks, self.names, respond, self.limit, draws), default=plain))

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

        results = self.results(respond, DRAWS_OF_RUN)
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
