"""Tasks of EleutherAI's lm-evaluation-harness, for `rwkv-peft eval`.

This is the only file that imports the package lm_eval, which takes seconds: import it only where it is needed.
"""

import difflib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable as plain  # noqa: F401  command.py writes results with it
from lm_eval.utils import make_table
from tqdm import tqdm

from ..cli.errors import UserError, bar_seconds, quoted, summarize
from ..data.tokenizer import Tokenizer
from ..inference.loading import Subject
from ..inference.prompts import encode
from ..inference.settings import Sampling
from .questions import GREEDY, sample
from .scoring import score_pairs

SCORED, ROLLING, GENERATED = "loglikelihood", "loglikelihood_rolling", "generate_until"  # lm_eval's kinds of requests
MAX_TOKENS = 256  # lm_eval's default for a task that names no length
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts
SAMPLES = ("do_sample", "temperature", "top_p", "top_k")
NEUTRAL = (("num_beams", 1),)  # settings that change nothing here
SEED = 1234  # lm_eval's default seed of the few-shot examples, of NumPy and of torch
DRAWS = 100_000  # bootstrap draws for standard errors that have no formula: lm_eval's default

Response = tuple[float, bool] | float | str  # to SCORED, ROLLING, GENERATED
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
    """The tasks of lm_eval and of the folder of --include_path; `alone` leaves out lm_eval's own, which take half a
    minute to read. Each list of tasks is loaded once; a failure is a UserError."""

    def __init__(self, folder: str | None, alone: bool = False) -> None:
        super().__init__(include_path=folder, include_defaults=not alone)
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
                raise UserError(unloadable(self.described(names), error)) from error
        for name, task in self.loaded[names]["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(f"{name} runs code that the model writes, which is not offered here")
            if getattr(task, "MULTIMODAL", False):
                raise UserError(f"{name} shows pictures or sounds, which an RWKV model does not take")
        return self.loaded[names]


def unloadable(listed: str, error: Exception) -> str:
    """The message on tasks that could not be loaded."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if kinds & {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        return (
            f"the data of {listed} is not on this disk, and the Hugging Face hub cannot be reached "
            f"({summarize(error)}); run it once with a network (unset HF_HUB_OFFLINE), or give tasks over files of "
            "your own with --include_path"
        )
    return f"{listed} cannot be loaded: {summarize(error, named=True)}"


def load_tasks(names: Sequence[str], folder: str | None) -> tuple[Tasks, list[str]]:
    """Load the tasks of these names -> (the Tasks, the names of those loaded).

    A pattern such as mmlu_* stands for all tasks that match. lm_eval's own tasks are not indexed if the folder's
    suffice. Raises UserError for a name without a task, and for a task that cannot be loaded.
    """
    tasks = Tasks(folder, alone=folder is not None)
    if not all(map(tasks.suffice_for, names)):
        tasks = Tasks(folder)
    task_names: list[str] = []
    for name in names:
        matches = tasks.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, tasks.all_tasks, 3)
            where = f"in lm_eval or in {folder}" if folder else "in lm_eval, and no --include_path with others"
            raise UserError(f"there is no task {name} {where}" + (f"; is it {' or '.join(near)}?" if near else ""))
        task_names += matches
    task_names = list(dict.fromkeys(task_names))
    tasks.load(task_names)
    return tasks, task_names


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
        return run_tasks(tasks, names, respond, limit)
    except Exception as error:  # lm_eval and a task's code may raise anything
        if answering or isinstance(error, UserError):
            raise
        raise UserError(f"{tasks.described(names)} cannot be asked: {summarize(error, named=True)}") from error


def set_shots(tasks: Tasks, names: Sequence[str], num_fewshot: int | None) -> None:
    """Set the number of few-shot examples, as simple_evaluate does (None: each task's own); 0 stays 0."""
    for task in tasks.load(names)["tasks"].values():
        task_shots = task.get_config("num_fewshot")
        if task_shots != 0:
            task.set_config(key="num_fewshot", value=(task_shots or 0) if num_fewshot is None else num_fewshot)


def run_tasks(tasks: Tasks, names: Sequence[str], respond: Respond, limit: int | None) -> Results:
    """Run lm_eval's tasks with the responses of respond(kind, requests) -> its results, with each question.

    Its simple_evaluate with the default seeds has the same, but runs git for the commit of the current folder, and a
    repository's settings may name programs to run.
    """
    loaded = tasks.load(names)
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)
    results: Results = evaluator.evaluate(Respondent(respond), loaded, limit=limit, bootstrap_iters=DRAWS)
    return results | {"lm_eval": version("lm_eval")}


def tables(results: Results) -> str:
    """lm_eval's tables of tasks and of groups."""
    groups = [make_table(results, "groups")] if results.get("groups") else []
    return "\n".join([make_table(results), *groups])
