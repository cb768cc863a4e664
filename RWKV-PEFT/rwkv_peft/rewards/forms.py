"""Rewards of an answer's form, without a word of the row: a regular expression, a JSON schema."""

import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.readable import require_readable
from ..cli.errors import UNREADABLE, UserError, quoted, short, told
from ..cli.installing import how_to_install
from .reward import Answer, Reward


class Match(Reward):
    """1 if the whole answer, without space at its ends, matches a regular expression, else 0."""

    def __init__(self, pattern: str) -> None:
        self.name = "match"
        try:
            self.pattern = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"no regular expression of Python: {told(error)}; mend it") from error

    def judge(self, answers: Sequence[Answer]) -> Sequence[object]:
        return [float(bool(self.pattern.fullmatch(answer.completion.strip()))) for answer in answers]


class Schema(Reward):
    """1 if the whole answer is JSON that satisfies a JSON schema, else 0."""

    def __init__(self, file: str) -> None:
        self.name = Path(file).stem
        if importlib.util.find_spec("jsonschema") is None:
            raise UserError(f"this Python has no package jsonschema; {how_to_install('eval')}")
        from jsonschema import exceptions, validators
        from referencing import Registry, Resource
        from referencing.exceptions import Unresolvable
        from referencing.jsonschema import DRAFT202012

        schema, reference = read_schema(file), ""
        try:
            kind = validators.validator_for(schema, validators.Draft202012Validator)
            kind.check_schema(schema)
            resource = Resource.from_contents(schema, DRAFT202012)
            address = resource.id() or ""
            registry = Registry().with_resource(address, resource).crawl()  # one of our own asks no network for others
            for reference in references(schema):
                registry.resolver(address).lookup(reference)
        except exceptions.SchemaError as error:
            raise UserError(f"no JSON schema: {told(error)} (at {short(error.json_path)}); mend it") from error
        except Unresolvable as error:
            raise UserError(
                f"its $ref {quoted(reference)} leads to nothing within the file, and no other is read; put it under "
                "$defs"
            ) from error
        except UNREADABLE as error:
            raise UserError(
                f"no JSON schema that is read here: {told(error, named=True)}; write it by draft 2020-12, and with "
                "fewer schemas within each other"
            ) from error
        self.validator = kind(schema, registry=registry)

    def judge(self, answers: Sequence[Answer]) -> Sequence[object]:
        return [float(self.satisfied(answer.completion)) for answer in answers]

    def satisfied(self, text: str) -> bool:
        """Tell whether a text is JSON, without NaN and Infinity, that satisfies the schema."""
        try:
            value = json.loads(text, parse_constant=no_constant)
            return bool(self.validator.is_valid(value))
        except (ValueError, RecursionError):  # no JSON, or brackets within a thousand others
            return False


def read_schema(file: str) -> Any:
    """Read the JSON of a schema. Raises UserError if the file is missing or no JSON object."""
    path = Path(file)
    require_readable(path, "no such file; name a JSON schema")
    try:
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {told(error)}; mend it") from error
    if not isinstance(schema, (dict, bool)):
        raise UserError(f"a JSON schema is an object, not {type(schema).__name__}")
    return schema


def references(schema: object) -> Iterator[str]:
    """Yield the values of all "$ref" and "$dynamicRef" of a schema."""
    if isinstance(schema, dict):
        yield from (schema[name] for name in ("$ref", "$dynamicRef") if isinstance(schema.get(name), str))
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from references(part)


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
