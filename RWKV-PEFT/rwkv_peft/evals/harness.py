"""Have EleutherAI's lm-evaluation-harness question a model and judge the answers.

This is the only file that imports the package lm_eval.
"""

import difflib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table
from tqdm import tqdm

from ..errors import UserError, told
from ..generate.loading import Subject
from ..streams import bar_seconds
from .aside import aside
from .requests import ROLLING, SCORED, WRITTEN, Answer, answers, question

ALONE = "DISABLE_MULTIPROC"  # the environment variable that keeps lm_eval in one process
SEED = 1234  # lm_eval's default seed of the examples before a question, of NumPy and of torch
DRAWS = 100_000  # lm_eval's default for bootstrapped standard errors
Results = dict[str, Any]
Respond = Callable[[str, Sequence[Any]], list[Answer]]


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


def results_of(tasks: Tasks, names: Sequence[str], respond: Respond, limit: int | None, draws: int) -> Results:
    """The results of `run` as plain JSON; nothing is printed, and no process is forked."""
    with aside(), unforked():
        return json.loads(json.dumps(run(tasks, names, respond, limit, draws), default=plain))


@contextmanager
def unforked() -> Iterator[None]:
    """Within, keep lm_eval from forking for its bootstrap, which would copy a run's threads and signal handlers."""
    before = os.environ.get(ALONE)
    os.environ[ALONE] = "1"
    try:
        yield
    finally:
        os.environ.pop(ALONE)
        if before is not None:
            os.environ[ALONE] = before


def tables(results: Results) -> str:
    """Write lm_eval's tables of tasks and of groups."""
    found = [make_table(results)]
    if results.get("groups"):
        found.append(make_table(results, "groups"))
    return "\n".join(found)


def plain(value: object) -> object:
    """Convert a value that JSON cannot hold, as lm_eval does."""
    return handle_non_serializable(value)
