"""The reward of a function in a file of the user's, in the form that trl takes: f(prompts, completions, **fields)."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..checkpoints.readable import require_readable
from ..cli.errors import UserError, field_names, told
from .reward import Answer, Reward

OWN = ("prompts", "completions")  # the parameters that are no fields of rows


class FunctionReward(Reward):
    """Calls the function with lists of prompts, completions and fields of the rows, as far as it takes them; fields
    come by their names, with None for a row that lacks one."""

    alone = False

    def __init__(self, file: str, function: str) -> None:
        self.name, self.file = function, file
        require_readable(file, "no such file; name a Python file, as FILE.py:FUNCTION")
        found = getattr(load(file), function, None)
        if found is None:
            raise UserError(f"the file has no {function}; name a function of it")
        if not callable(found) or inspect.isclass(found):
            raise UserError(f"{function} is {type(found).__name__}, not a function; name one")
        if inspect.iscoroutinefunction(found):
            raise UserError(f"{function} is async, and rewards are called one after the other; leave out async")
        self.function: Callable[..., Any] = found
        self.taken, self.due, self.takes_all = parameters(found)

    def check(self, row: Mapping[str, Any]) -> None:
        missing = [name for name in self.due if name not in row]
        if missing:
            raise UserError(
                f"the function takes {missing[0]}, and the row has the fields {field_names(row)}; "
                "add the field, or give the parameter a default"
            )

    def judge(self, answers: Sequence[Answer]) -> Sequence[object]:
        names = dict.fromkeys(name for answer in answers for name in answer.row)
        given = {name: [answer.row.get(name) for answer in answers] for name in names}
        given["prompts"] = [answer.prompt for answer in answers]
        given["completions"] = [answer.completion for answer in answers]
        if not self.takes_all:
            given = {name: values for name, values in given.items() if name in self.taken}
        found = self.function(**given)
        if isinstance(found, (str, bytes, Mapping)) or not hasattr(found, "__len__") or not hasattr(found, "__iter__"):
            raise UserError(f"it returned {type(found).__name__}; return a list with a number for each completion")
        if len(found) != len(answers):
            raise UserError(
                f"it returned {len(found)} values for {len(answers)} completions; return one for each, None for one "
                "that it does not judge"
            )
        return list(found)


def load(file: str) -> ModuleType:
    """Run a Python file as a module. What lies beside it can be imported by it, after everything that is installed, so
    that no file there stands in for a package. Raises UserError if the file raises."""
    path = Path(file).absolute()
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"reward of {path.stem}", path)
    assert spec is not None and spec.loader is not None  # because the name ends with .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"the file cannot be loaded: {raised(error, file)}; mend it") from error
    return module


def parameters(function: Callable[..., Any]) -> tuple[set[str], list[str], bool]:
    """(the names that a function takes, those fields that every row must have, whether it takes all others). Raises
    UserError for a function that cannot be called by names."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise UserError(f"its parameters are not known: {told(error)}; write it in Python") from error
    named = [one for one in found if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    for one in found:
        if one.kind is one.POSITIONAL_ONLY:
            raise UserError(f"parameters are given by name, which {one.name} does not take; leave out the /")
    due = [one.name for one in named if one.default is one.empty and one.name not in OWN]
    return {one.name for one in named}, due, any(one.kind is one.VAR_KEYWORD for one in found)


def raised(error: BaseException, file: str) -> str:
    """Tell an exception of a user's file in one line, with the last line of the file that led to it."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).name == Path(file).name
    ]
    return told(error, named=True) + (f" ({file}, line {lines[-1]})" if lines else "")
