"""Hold answers to a JSON schema: before each draw, leave only the tokens that such a text may go on with.

The llguidance package knows these tokens. JSON is written in one line, with or without a space behind commas and
colons, because a model may go on writing space forever where it may write any.
"""

import json
import threading
from collections.abc import Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import llguidance
import numpy as np
import torch

from ..data.tokenizer import Tokenizer
from .refused import Refused

ANY = MappingProxyType({"type": "object"})  # the schema of a json_object
SPACES = MappingProxyType({"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"})
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
        """The tokens that may be drawn next: (V,) bool. After an error, as of a text that takes too long to judge, it
        is the end alone."""
        if self.matcher.is_error():
            return torch.arange(self.size) == Vocabulary.eos_token_id
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        return torch.from_numpy(np.unpackbits(bits, count=self.size, bitorder="little")).bool()

    def take(self, token: int) -> None:
        self.matcher.consume_token(token)


class Schemas:
    """Compiles schemas for a tokenizer whose tokens are bytes; its first `size` tokens may be drawn."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size
        self._making = threading.Lock()

    @cached_property
    def _vocabulary(self) -> Any:
        wrapped = llguidance.TokenizerWrapper(Vocabulary(self.tokenizer, self.size))
        return llguidance.LLTokenizer(wrapped, n_vocab=self.size)

    def compiled(self, form: dict[str, Any], think: str) -> "Compiled | None":
        """Compile a request's response_format, None if any text will do. Raises Refused for one that cannot be held."""
        kind = form.get("type", "text")
        schema: Any = dict(ANY)
        if kind == "text":
            return None
        if kind == "json_schema":
            schema = (form.get("json_schema") or {}).get("schema")
        if kind not in ("json_object", "json_schema") or not isinstance(schema, dict):
            raise wrong('{"type": "json_schema", "json_schema": {"name": …, "schema": {…}}} is due')
        if think not in OPENINGS:
            raise wrong("an answer with thinking is not held to a form; leave think out")
        if not hasattr(self.tokenizer, "token_bytes"):
            raise wrong(f"tokenizer {self.tokenizer.name} does not tell the bytes of its tokens")
        body = json.dumps({**schema, "x-guidance": dict(SPACES)})
        grammar = f"start: {OPENINGS[think]} body\nbody: %json {body}"
        with self._making:
            matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise wrong(matcher.get_error().partition("\n")[0])
        return Compiled(matcher, self.size)


class Compiled:
    """A schema, for any number of answers."""

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size = matcher, size

    def held(self) -> Held:
        return Held(self._matcher.deep_copy(), self._size)


def wrong(words: str) -> Refused:
    return Refused(400, f"response_format: {words}", "response_format")
