"""Chunks of rows -> tokens and masks."""

import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from ..errors import UserError, visible
from .binidx import dtype_code
from .pairs import pair
from .rows import Chunk
from .templates import TURN_END, Segment, Template, UnknownForm, named_segments, segments, thinks
from .tokenizer import load_tokenizer

Piece = tuple[list[int], bool]  # the tokens of a text, and whether they count in the loss
Documents = list[list[Segment]]  # of one row


class Remedies(NamedTuple):
    """What mends a mistake, in the flags of the command that reads the rows."""

    unknown_form: str
    bad_row: str
    no_end: str


REMEDIES = MappingProxyType(
    {
        "preprocess": Remedies(
            "name others with --fields", "--skip_bad_rows leaves such rows out, and counts them", "take --no-append_eod"
        ),
        "train": Remedies(
            "name others with --sft_field",
            "mend or remove that row; rwkv-peft preprocess --skip_bad_rows makes token files without such rows",
            "make token files with rwkv-peft preprocess --no-append_eod",
        ),
        "pairs": Remedies("name others with --sft_field", "mend or remove that row", "take one that does"),
    }
)


@dataclass(frozen=True)
class EncodeSettings:
    """How rows become documents.

    tokenizer as load_tokenizer takes it; end_token ends each document with the tokenizer's end_id;
    fields names the row's text (one field) or its prompt and answer (two) where they are not
    recognised; template is the text of a template; think ("", "on", "off") is how answers of chats are opened
    (thinking.py); skip_bad_rows counts rows that cannot be read instead of stopping. max_tokens (0: no limit) bounds a
    document: "left" removes tokens from the front of the prompt, and then from the end of the answer; "skip" leaves the
    document out. command, one of REMEDIES, is the one whose flags messages name. With "pairs" each row is two
    documents, its better and its worse answer (pairs.py).
    """

    tokenizer: str = "world"
    end_token: bool = True
    fields: tuple[str, ...] = ()
    template: str = ""
    think: str = ""
    skip_bad_rows: bool = False
    max_tokens: int = 0
    too_long: str = "left"
    command: str = "preprocess"

    @property
    def pairs(self) -> bool:
        return self.command == "pairs"


COUNTS = tuple("characters bad empty shortened too_long equal bare wordless thinking at_once".split())


@dataclass
class Encoded:
    """Documents as bytes: tokens in the writer's dtype, a mask byte for each, sizes in tokens.

    characters of text were read. bad counts rows left out and examples says what was wrong with the
    first of them; empty, shortened and too_long count documents, or pairs of them; equal those whose answers are the
    same, bare those that lack a prompt or an answer; wordless rows in which an answer is empty, or there is none;
    thinking and at_once rows with thinking and without, where it is asked for.
    """

    sizes: list[int] = field(default_factory=list)
    tokens: bytes = b""
    mask: bytes = b""
    continues: bool = False
    characters: int = 0
    bad: int = 0
    examples: list[str] = field(default_factory=list)
    empty: int = 0
    shortened: int = 0
    too_long: int = 0
    equal: int = 0
    bare: int = 0
    wordless: int = 0
    thinking: int = 0
    at_once: int = 0

    def add_counts(self, other: "Encoded") -> None:
        """Add another's counts, but not its documents."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.examples = (self.examples + other.examples)[:3]


def encode_chunk(chunk: Chunk, settings: EncodeSettings) -> Encoded:
    """Chunk -> Encoded; UserError names the line of the first bad row unless skip_bad_rows."""
    return encoder(settings).encode(chunk)


@lru_cache(maxsize=4)
def encoder(settings: EncodeSettings) -> "Encoder":
    """The Encoder of these settings, made once in each process."""
    return Encoder(settings)


class Encoder:
    """A tokenizer and a template, ready to encode chunks."""

    def __init__(self, settings: EncodeSettings) -> None:
        self.settings, self.remedies = settings, REMEDIES[settings.command]
        self.tokenizer = load_tokenizer(settings.tokenizer)
        self.code = "H" if dtype_code(self.tokenizer.vocab_size) == 8 else "i"
        self.end_id = self.tokenizer.end_id if settings.end_token else None
        if settings.end_token and self.end_id is None:
            raise UserError(
                f"--tokenizer {self.tokenizer.name} names no end-of-document token, which each document ends with; "
                + self.remedies.no_end
            )
        if settings.template and settings.fields:
            raise UserError("--template and --fields both say which fields are read; give one of them")
        if settings.template and settings.think:
            raise UserError(
                "--template and --think both say what opens an answer; write it into the template, as the templates "
                "think and no-think do"
            )
        self.layout: Callable[[object, str], Documents]
        if settings.pairs:
            self.layout = lambda row, think: pair(row, settings.fields, think)
        elif settings.template:
            template = Template(settings.template)
            self.layout = lambda row, think: [template(row)]
        elif settings.fields:
            self.layout = lambda row, think: [named_segments(row, settings.fields, think)]
        else:
            self.layout = lambda row, think: [segments(row, think)]

    def documents(self, row: object) -> Documents:
        """A row's documents; one that holds no thinking where that is asked for is laid out as an answer at once, and a
        pair where either has none: both answer the same prompt."""
        found = self.layout(row, self.settings.think)
        if self.settings.think != "on" or all(map(thinks, found)):
            return found
        return self.layout(row, "off")

    def encode(self, chunk: Chunk) -> Encoded:
        result, tokens, mask = Encoded(continues=chunk.continues), array(self.code), bytearray()
        for offset, item in enumerate(chunk.items):
            if isinstance(item, bytes) and not item.strip():
                continue
            try:
                whole = isinstance(item, str) and not self.settings.pairs
                documents = [[(str(item), True)]] if whole else self.documents(parse(item))
                if self.settings.pairs and not all(map(asked_and_answered, documents)):
                    result.bare += 1
                    continue
                pieces = [
                    [(self.tokenizer.encode(text), counts) for text, counts in document] for document in documents
                ]
            except UserError as error:
                message = f"{chunk.source}, {chunk.unit} {chunk.first + offset}: {error}"
                if isinstance(error, UnknownForm):
                    message += f"; {self.remedies.unknown_form}"
                if not self.settings.skip_bad_rows:
                    raise UserError(f"{message}\n({self.remedies.bad_row})") from error
                result.bad += 1
                result.examples = (result.examples + [visible(message)])[:3]
                continue
            added = self._add(pieces, chunk, result, tokens, mask)
            result.wordless += added and not whole and not all(map(has_words, documents))
            if added and self.settings.think == "on" and not isinstance(item, str):
                thinking = thinks(documents[0])
                result.thinking += thinking
                result.at_once += not thinking
            result.characters += sum(len(text) for document in documents for text, _ in document)
        result.tokens, result.mask = tokens.tobytes(), bytes(mask)
        return result

    def _add(
        self, documents: list[list[Piece]], chunk: Chunk, result: Encoded, tokens: "array[int]", mask: bytearray
    ) -> bool:
        """Append the documents of a row, or a piece of one, [(ids, counts)] each, to the chunk's tokens and mask; ->
        whether they were to be."""
        if not chunk.continues and not any(ids for pieces in documents for ids, _ in pieces):
            result.empty += 1
            return False
        if self.settings.pairs and documents[0] == documents[1]:
            result.equal += 1
            return False
        if self.end_id is not None and chunk.ends:
            for pieces in documents:
                pieces.append(([self.end_id], pieces[-1][1]))
        longest, limit = max(map(length, documents)), self.settings.max_tokens
        if limit and longest > limit:
            if self.settings.too_long == "skip":
                result.too_long += 1
                return False
            documents = [shorten(pieces, longest - limit, limit) for pieces in documents]
            result.shortened += 1
        for pieces in documents:
            for ids, counts in pieces:
                tokens += array(self.code, ids)  # faster than extend(ids)
                mask.extend((b"\1" if counts else b"\0") * len(ids))
            result.sizes.append(length(pieces))
        return True


def asked_and_answered(document: list[Segment]) -> bool:
    """Whether a document has words that do not count before some that do."""
    (prompt, counts), *_ = document
    return bool(prompt and not counts) and any(text.strip() for text, counts in document if counts)


def has_words(document: list[Segment]) -> bool:
    """Whether a document has something that counts, none of which is blank but what parts turns."""
    learned = [text for text, counts in document if counts]
    return bool(learned) and all(text.strip() or text == TURN_END for text in learned)


def length(pieces: list[Piece]) -> int:
    """The tokens of a document."""
    return sum(len(ids) for ids, _ in pieces)


def shorten(pieces: list[Piece], excess: int, limit: int) -> list[Piece]:
    """Remove `excess` tokens of the prompt's front, or all but its last, and what is then beyond `limit` at the end."""
    prompt = 0
    for ids, counts in pieces:
        if counts:
            break
        prompt += len(ids)
    front = min(excess, max(prompt - 1, 0))
    back = max(0, length(pieces) - front - limit)
    shorter = []
    for ids, counts in pieces:
        cut = min(front, len(ids))
        front -= cut
        shorter.append((ids[cut:], counts))
    for index in reversed(range(len(shorter))):
        ids, counts = shorter[index]
        cut = min(back, len(ids))
        back -= cut
        shorter[index] = (ids[: len(ids) - cut], counts)
    return shorter


def parse(item: object) -> Any:
    """A line of JSON, or a row that is read already -> the row."""
    if not isinstance(item, bytes):
        return item
    try:
        return json.loads(item)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error}); a .jsonl file holds one JSON object a line") from error
