"""Hold answers to a JSON schema, or to a call of a tool: before each draw, leave only the tokens with which such a text
may go on.

The llguidance package knows these tokens. JSON is written in one line, with or without a space behind commas and
colons, because a model may go on writing space forever where it may write any.
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

from ...data.tokenizer import Tokenizer
from .forms import ChatAsked
from .gate import Refused
from .trial import MEMORY, SECONDS, compiles

ANY = MappingProxyType({"type": "object"})  # the schema of a json_object
# how JSON is written, and oneOf as anyOf if its forms may overlap, because that just one holds cannot be known ahead
OPTIONS = MappingProxyType(
    {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "coerce_one_of": True}
)
LARGEST = 1 << 19  # characters of a schema; llguidance takes no larger ones
REMEMBERED = 10_000  # grammars that are known to compile
OPENINGS = MappingProxyType({"": '" "?', "off": '">\\n"'})  # what comes before an answer's JSON, by ChatAsked.think


class Vocabulary:
    """A tokenizer as llguidance asks for it."""

    eos_token_id, bos_token_id = 0, None
    special_token_ids = (0,)

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        table: Sequence[bytes | None] = getattr(tokenizer, "token_bytes")[1:size]  # noqa: B009  others have none
        self.tokens = [b"<|endoftext|>", *(token or b"" for token in table), *[b""] * (size - 1 - len(table))]
        self.tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self.tokenizer.encode(text.decode())


class Held:
    """One answer that is held to a schema."""

    def __init__(self, matcher: Any, size: int) -> None:
        self.matcher, self.size = matcher, size

    def allowed(self) -> torch.Tensor:
        """The tokens that may be drawn next: (V,) bool. After an error, llguidance has the end alone."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        return torch.from_numpy(np.unpackbits(bits, count=self.size, bitorder="little")).bool()

    def take(self, token: int) -> bool:
        self.matcher.consume_token(token)
        return not self.matcher.is_error()


class Schemas:
    """Compiles schemas for a tokenizer whose tokens are bytes; its first `size` tokens may be drawn."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size
        self._tried: set[bytes] = set()

    @cached_property
    def _vocabulary(self) -> Any:
        wrapped = llguidance.TokenizerWrapper(Vocabulary(self.tokenizer, self.size))
        return llguidance.LLTokenizer(wrapped, n_vocab=self.size)

    def compiled(self, form: ChatAsked) -> "Compiled | None":
        """Compile what a request holds its answers to, None if any text will do; called for one request at a time.
        Raises Refused for what cannot be held."""
        field, text = "response_format", "body"
        schema = schema_of(form.response_format) if form.response_format else None
        if form.must_call:
            if schema is not None:
                raise wrong("tool_choice", "a call has a form of its own; leave response_format out")
            field, text, schema = "tool_choice", '"<tool_call>\\n" body "\\n</tool_call>"', call_schema(form)
        if schema is None:
            return None
        opening = OPENINGS.get(form.think or "")
        if opening is None:
            raise wrong(field, "an answer with thinking is not held to a form; leave think out")
        if not hasattr(self.tokenizer, "token_bytes"):
            raise wrong(field, f"tokenizer {self.tokenizer.name} does not tell the bytes of its tokens")
        grammar = f"start: {opening} {text}\nbody: %json {written(field, {**schema, 'x-guidance': dict(OPTIONS)})}"
        self._try(field, grammar)
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise wrong(field, matcher.get_error().partition("\n")[0])
        held = Compiled(matcher, self.size).held()
        held.take(int(held.allowed().int().argmax()))
        if not held.allowed().any() or held.matcher.is_error():  # as of a schema that only refers to itself
            raise wrong(field, "no text satisfies the schema; mend what refers to itself in it")
        return Compiled(matcher, self.size)

    def _try(self, field: str, grammar: str) -> None:
        """Raise Refused for a grammar that would take too long, or too much memory, to compile."""
        digest = hashlib.sha256(grammar.encode()).digest()
        if digest in self._tried:
            return
        if not compiles(grammar):
            raise wrong(field, f"the schema takes more than {SECONDS} seconds or {MEMORY >> 20} MiB; make it simpler")
        if len(self._tried) >= REMEMBERED:
            self._tried.clear()
        self._tried.add(digest)


def schema_of(form: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema of a response_format, None if any text will do."""
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


def written(field: str, schema: Mapping[str, Any]) -> str:
    """A schema as JSON, by Python, because json.dumps would let nobody else run meanwhile. Raises Refused if it is too
    large."""
    parts, size = [], 0
    for part in json.JSONEncoder().iterencode(schema):
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            raise Refused(413, f"{field}: the schema is larger than {LARGEST:,} characters; make it simpler", field)
    return "".join(parts)


def call_schema(form: ChatAsked) -> dict[str, Any]:
    """The schema of the call that tool_choice demands: of the tool that it names, or of any."""
    match form.tool_choice:
        case "required":
            name = None
        case {"type": "function", "function": {"name": str(name)}}:
            pass
        case _:
            due = '"auto", "none", "required" or {"type": "function", "function": {"name": …}} is due'
            raise wrong("tool_choice", due)
    functions = [tool.get("function", tool) for tool in form.tools or ()]
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


class Compiled:
    """A schema, for any number of answers."""

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size = matcher, size

    def held(self) -> Held:
        return Held(self._matcher.deep_copy(), self._size)


def wrong(field: str, words: str) -> Refused:
    return Refused(400, f"{field}: {words}", field)
