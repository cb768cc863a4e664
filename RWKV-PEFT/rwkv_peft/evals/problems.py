"""Read the problems of a file, in the text of a layout."""

from ..data.encoding import parse
from ..data.rows import held_chunks
from ..errors import UserError
from .layouts import read_layout
from .task import Problem, Task


def layout_of(task: Task, name: str | None, flag: str = "--template") -> str:
    """Return the text of the layout that a flag names, else of the task's; "" for the rows' own. Raises UserError as
    read_layout does."""
    return read_layout(name or task.layout, flag) if name or task.layout else ""


def read_problems(task: Task, path: str, split: str, layout: str) -> list[Problem]:
    """Read the Problems of a file. Raises UserError for a row that is none, with its place, and if there are none."""
    problems = []
    for chunk in held_chunks(path, split):
        for number, item in enumerate(chunk.items, start=chunk.first):
            if isinstance(item, bytes) and not item.strip():
                continue
            try:
                problems.append(task.problem(parse(item), layout))
            except UserError as error:
                raise UserError(f"{path}, {chunk.unit} {number}: {error}") from error
    if not problems:
        raise UserError(f"{path} holds no problem" + (f" in {split}" if split else ""))
    return problems
