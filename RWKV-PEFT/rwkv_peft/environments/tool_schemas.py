"""The tools of an environment as a chat's system turn lists them: its public methods, by their types and docstrings.

An environment is a class in the form of trl's `environment_factory`: reset(**row) begins a conversation, public methods
are the tools, and get_reward(), if there is one, scores the finished conversation.
"""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ..cli.errors import UserError, summarize

RESET, SCORE = "reset", "get_reward"
NAMES = MappingProxyType(
    {
        str: "string",
        int: "integer",
        float: "number",
        bool: "boolean",
        dict: "object",
        list: "array",
        tuple: "array",
        type(None): "null",
    }
)


def methods_of(environment: type) -> dict[str, Callable[..., Any]]:
    """The methods of a class that are tools, by name. Raises UserError if it lacks reset, or has no tool."""
    if not callable(getattr(environment, RESET, None)):
        raise UserError(f"{environment.__name__} has no method {RESET}(**row), which begins a conversation; add it")
    found: dict[str, Callable[..., Any]] = dict(inspect.getmembers(environment, predicate=inspect.isfunction))
    tools = {name: found[name] for name in found if not name.startswith("_") and name not in (RESET, SCORE)}
    if not tools:
        raise UserError(f"{environment.__name__} has no public method besides {RESET}, and so no tool; add one")
    return tools


def tool_schema(name: str, method: Callable[..., Any]) -> dict[str, Any]:
    """{name, description, parameters} of a tool, with parameters as a JSON schema. Raises UserError for a method
    without a docstring, or with a parameter without a type that JSON has."""
    text = inspect.getdoc(method) or ""
    description, arguments = described(text)
    if not description:
        raise UserError(f"the tool {name} has no docstring, from which the model learns its purpose; write one")
    try:
        hints = typing.get_type_hints(method)
    except Exception as error:
        raise UserError(
            f"the types of the tool {name} are not known: {summarize(error, named=True)}; mend them"
        ) from error
    properties, required = {}, []
    for one in [*inspect.signature(method).parameters.values()][1:]:
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD, one.POSITIONAL_ONLY):
            raise UserError(f"the tool {name} takes {one}, and calls give arguments by name; name each parameter")
        if one.name not in hints:
            raise UserError(
                f"the parameter {one.name} of the tool {name} has no type; write {one.name}: str, or another"
            )
        properties[one.name] = type_schema(hints[one.name], f"the parameter {one.name} of the tool {name}")
        if words := arguments.get(one.name):
            properties[one.name]["description"] = words
        if one.default is one.empty:
            required.append(one.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"name": name, "description": description, "parameters": parameters}


def type_schema(kind: Any, what: str) -> dict[str, Any]:
    """The JSON schema of a Python type. Raises UserError, with `what` has it, for a type that JSON does not have."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return {}
    if origin is typing.Literal:
        return {"enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        choices = [type_schema(each, what) for each in inner if each is not type(None)]
        return choices[0] if len(choices) == 1 else {"anyOf": choices}
    if (origin or kind) not in NAMES:
        raise UserError(
            f"{what} has the type {kind}, which JSON does not have; take str, int, float, bool, list or dict"
        )
    schema: dict[str, Any] = {"type": NAMES[origin or kind]}
    if origin is list:
        schema["items"] = type_schema(inner[0], what)
    return schema


def described(text: str) -> tuple[str, Mapping[str, str]]:
    """Part a docstring in Google's style -> (its description, {parameter: its description})."""
    description, _, rest = text.partition("\nArgs:\n")
    arguments: dict[str, str] = {}
    indent, name = "", ""
    for line in rest.splitlines():
        inside = line[: len(line) - len(line.lstrip())]
        if line.strip() and not inside:  # the next section
            break
        indent = indent or inside
        if inside == indent and ":" in line:
            name, _, words = line.strip().partition(":")
            name = name.partition("(")[0].strip()
            arguments[name] = words.strip()
        elif name:
            arguments[name] = f"{arguments[name]} {line.strip()}".strip()
    return description.partition("\nReturns:\n")[0].strip(), arguments
