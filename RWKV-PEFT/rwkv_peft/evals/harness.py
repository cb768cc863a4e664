"""A model as EleutherAI's lm-evaluation-harness asks one, and what that says of the answers.

The one file that knows the package lm_eval.
"""

import difflib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator, simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table
from tqdm import tqdm

from ..errors import UserError, told
from ..generate.loading import Subject
from ..streams import bar_seconds
from .aside import aside
from .requests import ROLLING, SCORED, WRITTEN, Answer, answers, question

ALONE = "DISABLE_MULTIPROC"  # the variable by which lm_eval is told so
SEED = 1234  # from which lm_eval draws the examples before a question, and most else
Results = dict[str, Any]
Respond = Callable[[str, Sequence[Any]], list[Answer]]


class Respondent(LM):
    """Hands lm_eval's requests to respond(kind, requests), which has an answer to each, in their order."""

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
    """lm_eval's tasks and those of a folder; what cannot be loaded is told in words, and what can is loaded once."""

    def __init__(self, folder: str | None, flag: str, alone: bool = False) -> None:
        """flag: what names the folder; alone: the folder's tasks and no others, since reading the files of all of
        lm_eval's takes half a minute."""
        super().__init__(include_path=folder, include_defaults=not alone)
        self.flag = flag
        self.loaded: dict[tuple[str, ...], Any] = {}

    def suffice_for(self, name: str) -> bool:
        """Whether a name is that of one of these tasks, or of a group of them alone: others may be lm_eval's."""
        entry, known = self.task_index.get(name), self.all_subtasks
        members = entry.cfg.get("task") if entry is not None and entry.cfg else None
        return name in known or (isinstance(members, list) and all(member in known for member in members))

    def described(self, names: Sequence[str]) -> str:
        """Tasks with the files that define them, as a message names them."""
        entries = [self.task_index.get(name) for name in names]
        files = [f" ({entry.yaml_path})" if entry is not None and entry.yaml_path else "" for entry in entries]
        return ", ".join(f"{name}{file}" for name, file in zip(names, files))

    def load(self, task_list: Any) -> Any:
        names = tuple(task_list)
        if names not in self.loaded:
            try:
                self.loaded[names] = super().load(list(names))
            except Exception as error:  # whatever a task's file, its code and its data may raise
                raise UserError(unloadable(self.described(names), error, self.flag)) from error
        for name, task in self.loaded[names]["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(f"{name} runs code that the model writes, which is not offered here")
            if getattr(task, "MULTIMODAL", False):
                raise UserError(f"{name} shows pictures or sounds, which an RWKV model does not take")
        return self.loaded[names]


def unloadable(listed: str, error: Exception, flag: str) -> str:
    """What became of loading the tasks that are listed, in words; flag names a folder of others."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if kinds & {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        return (
            f"the data of {listed} is not on this disk, and the Hugging Face hub cannot be reached "
            f"({told(error)}); run it once where there is a network (unset HF_HUB_OFFLINE), or give tasks over files "
            f"of your own with {flag}"
        )
    return f"{listed} cannot be loaded: {told(error, named=True)}"


def load_tasks(names: Sequence[str], folder: str | None, flag: str = "--include_path") -> tuple[Tasks, list[str]]:
    """(the tasks that there are, with those of a folder that a flag names, those that are meant loaded; their names:
    patterns such as mmlu_* stand for all that match). Raises UserError for a name that is none, and for what cannot be
    loaded."""
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
    """lm_eval's results of a model on tasks, with bars that tell how far it is. Raises UserError for what lm_eval makes
    of a task's file, and cannot go on with."""
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

    with git_unheard():
        try:
            results: Results = simple_evaluate(
                model=Respondent(respond),
                tasks=names,
                task_manager=tasks,
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch,
            )
        except Exception as error:  # whatever lm_eval, or a task's code, raises; but not what our own answering does
            if answering or isinstance(error, UserError):
                raise
            raise UserError(f"{tasks.described(names)} cannot be asked: {told(error, named=True)}") from error
    return results


@contextmanager
def git_unheard() -> Iterator[None]:
    """lm_eval notes the commit of the current folder, and has git complain to the user where there is none."""
    before = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = commit_here
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = before


def commit_here() -> str | None:
    """What git calls the commit of the current folder, None where there is none, or no git."""
    try:
        return subprocess.run(["git", "describe", "--always"], capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def set_shots(tasks: Tasks, names: Sequence[str], num_fewshot: int | None) -> None:
    """Have tasks show so many examples before a question, as simple_evaluate does; None: as many as each says."""
    for task in tasks.load(names)["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:
            task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)


def results_of(tasks: Tasks, names: Sequence[str], respond: Respond, limit: int | None, draws: int) -> Results:
    """lm_eval's results of tasks, plain JSON, where respond(kind, requests) has the answers: what simple_evaluate finds
    with its seeds, but without a word, in this process alone, and without a look at the machine. Standard errors that
    have no formula are those of so many draws; with 0 there are none."""
    loaded = tasks.load(names)
    with aside(), unforked():
        random.seed(0)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=SEED)
        found = evaluator.evaluate(Respondent(respond), loaded, limit=limit, bootstrap_iters=draws, log_samples=False)
    return json.loads(json.dumps(found | {"lm_eval": version("lm_eval")}, default=plain))


@contextmanager
def unforked() -> Iterator[None]:
    """lm_eval forks no processes to draw, as it would of a run's, with all its threads and signal handlers."""
    before = os.environ.get(ALONE)
    os.environ[ALONE] = "1"
    try:
        yield
    finally:
        os.environ.pop(ALONE)
        if before is not None:
            os.environ[ALONE] = before


def tables(results: Results) -> str:
    """lm_eval's tables, of tasks and of groups of them."""
    found = [make_table(results)]
    if results.get("groups"):
        found.append(make_table(results, "groups"))
    return "\n".join(found)


def plain(value: object) -> object:
    """What JSON has no word for, as lm_eval writes it."""
    return handle_non_serializable(value)
