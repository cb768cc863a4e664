"""Structured output: before each draw, forbid the tokens with which an answer could not become JSON of its schema, or a
call of a tool.

The llguidance package computes these tokens. JSON is written in one line, with or without a space behind commas and
colons: where a model may write any white space, it may write it forever.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import llguidance
import numpy as np
import torch

from ...cli.names import G1
from ...data.chat import THINK
from ...data.tokenizer import Tokenizer
from ...data.tools import TOOL_FORMS, ToolForm
from .requests import ChatBody, wrong
from .trial import MEMORY, SECONDS, compiles
from .web import RequestError

ANY = MappingProxyType({"type": "object"})  # the schema of a json_object
# JSON in one line, and oneOf as anyOf if its forms may overlap: that just one of them holds is not known in advance
OPTIONS = MappingProxyType(
    {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "coerce_one_of": True}
)
LARGEST = 1 << 19  # characters of a schema; llguidance takes no larger ones
REMEMBERED = 10_000  # grammars that are known to compile
# ChatBody.mode -> the opening of an answer before its JSON
OPENINGS = MappingProxyType({"": '" "?'} | {name: '">\\n"' for name, mode in THINK.items() if not mode.thinks})


class GuidanceVocabulary:
    """A tokenizer in the form that llguidance takes."""

    eos_token_id, bos_token_id = 0, None
    special_token_ids = (0,)

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        table: Sequence[bytes | None] = getattr(tokenizer, "token_bytes")[1:size]  # noqa: B009  others have none
        self.tokens = [b"<|endoftext|>", *(token or b"" for token in table), *[b""] * (size - 1 - len(table))]
        self.tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self.tokenizer.encode(text.decode())


class SchemaConstraint:
    """The Constraint of a grammar, at its beginning or within a text."""

    def __init__(self, matcher: Any, size: int) -> None:
        self.matcher, self.size = matcher, size

    def copy(self) -> "SchemaConstraint":
        return SchemaConstraint(self.matcher.deep_copy(), self.size)

    def allowed(self) -> torch.Tensor:
        """The tokens that may come next: (V,) bool. After an error, llguidance allows the end alone."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        return torch.from_numpy(np.unpackbits(bits, count=self.size, bitorder="little")).bool()

    def accept(self, token: int) -> bool:
        self.matcher.consume_token(token)
        return not self.matcher.is_error()


class SchemaCompiler:
    """Compiles schemas for a tokenizer with `token_bytes`; its first `size` tokens may be sampled. Calls
    are in a ToolForm."""

    def __init__(self, tokenizer: Tokenizer, size: int, form: ToolForm = TOOL_FORMS[G1]) -> None:
        self.tokenizer, self.size, self.form = tokenizer, size, form
        self._tried: set[bytes] = set()

    @cached_property
    def _vocabulary(self) -> Any:
        wrapped = llguidance.TokenizerWrapper(GuidanceVocabulary(self.tokenizer, self.size))
        return llguidance.LLTokenizer(wrapped, n_vocab=self.size)

    def compiled(self, body: ChatBody) -> SchemaConstraint | None:
        """The constraint of a chat's answers at their beginning, None for free text; not thread-safe. Raises
        RequestError for a schema that cannot be followed."""
        field, text, options = "response_format", "body", dict(OPTIONS)
        schema = schema_of(body.response_format) if body.response_format else None
        if body.must_call:
            if schema is not None:
                raise wrong("tool_choice", "a call has a form of its own; leave response_format out")
            begin, _, end = map(json.dumps, self.form.calls)
            field, text, schema = "tool_choice", f"{begin} body {end}", call_schema(body)
            # as the next request lays the call out: the cache then holds the state behind it
            options |= dict(zip(("item_separator", "key_separator"), self.form.separators))
        if schema is None:
            return None
        opening = OPENINGS.get(body.mode)
        if opening is None:
            raise wrong(field, f"an answer with thinking ({body.mode}) is not held to a form; give think off")
        opening = opening.removesuffix("?") if body.must_call else opening
        if not hasattr(self.tokenizer, "token_bytes"):
            raise wrong(field, f"tokenizer {self.tokenizer.name} does not tell the bytes of its tokens")
        written = json.dumps({**schema, "x-guidance": options})
        if len(written) > LARGEST:
            message = f"{field}: the schema is larger than {LARGEST:,} characters; make it simpler"
            raise RequestError(413, message, field)
        grammar = f"start: {opening} {text}\nbody: %json {written}"
        self._try(field, grammar)
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise wrong(field, matcher.get_error().partition("\n")[0])
        constraint = SchemaConstraint(matcher, self.size)
        begun = constraint.copy()
        begun.accept(int(begun.allowed().int().argmax()))
        if not begun.allowed().any() or begun.matcher.is_error():  # as of a schema that only refers to itself
            raise wrong(field, "no text satisfies the schema; mend what refers to itself in it")
        return constraint

    def _try(self, field: str, grammar: str) -> None:
        """Raise RequestError for a grammar that would take too long, or too much memory, to compile."""
        digest = hashlib.sha256(grammar.encode()).digest()
        if digest in self._tried:
            return
        if not compiles(grammar):
            raise wrong(field, f"the schema takes more than {SECONDS} seconds or {MEMORY >> 20} MiB; make it simpler")
        if len(self._tried) >= REMEMBERED:
            self._tried.clear()
        self._tried.add(digest)


def schema_of(form: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema of a response_format, None for free text."""
    match form:
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return schema
        case {"type": "json_object", "schema": dict(schema)}:
            return schema
        case {"type": "json_object"} if form.get("schema") is None:
            return dict(ANY)
        case {"type": "text"}:
            return None
    raise wrong("response_format", '{"type": "json_schema", "json_schema": {"name": …, "schema": {…}}} is due')


def call_schema(body: ChatBody) -> dict[str, Any]:
    """The schema of the call that tool_choice requires, of the tool with its name or of any."""
    match body.tool_choice:
        case "required":
            name = None
        case {"type": "function", "function": {"name": str(name)}}:
            pass
        case _:
            due = '"auto", "none", "required" or {"type": "function", "function": {"name": …}} is due'
            raise wrong("tool_choice", due)
    functions = [tool.get("function", tool) for tool in body.tools or ()]
    chosen = [one for one in functions if isinstance(one, dict) and name in (None, one.get("name"))]
    if not chosen:
        raise wrong("tool_choice", "there is no such tool among `tools`; list it there")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": one.get("name")}, "arguments": one.get("parameters") or dict(ANY)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for one in chosen
    ]
    return {"anyOf": calls}
