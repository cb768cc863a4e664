"""Encodes chunks of rows as tokens and masks."""

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

from ..cli.errors import UserError, visible
from .bad_rows import BadRows
from .binidx import dtype_code
from .cutting import Piece, length, shorten, windows
from .encode_settings import ALIKE, HEADER, REMEDIES, EncodeSettings
from .fields import Fields, UnknownForm
from .row_forms import TURNS, UNDESIRABLE, in_context, label_of, labelled, opened, pair, refuse_compared
from .rows import CSV_ENDINGS, TO_UTF_8, Chunk
from .templates import FOREIGN_MARKS, Template, named_segments, opening_within, segments, thinks
from .tokenizer import load_tokenizer, utf8
from .tools import as_list
from .turns import FIELDS, SPEAKERS, TURN_END, Segment, weight_of

Documents = list[list[Segment]]  # the documents of one row
# the kinds of rows (EncodeSettings.command) that have a layout of their own: (row, fields, think, clean) -> documents
LAYOUTS: Mapping[str, Callable[[object, Sequence[str], str, bool], Documents]] = MappingProxyType(
    {
        "pairs": pair,
        "labels": lambda *row: [labelled(*row)],
        "prompts": lambda *row: [opened(*row)],
        "contexts": in_context,
    }
)
DIGEST = 16  # bytes of a row's
OTHERS = frozenset(f"{speaker}:" for speaker in SPEAKERS.values()) - {"Assistant:"}  # what opens their turns in a chat
# a turn before an answer that has only its speaker's name
EMPTY_TURN = re.compile(r"(?:^|\n\n)(?:System|User|Tool|Question|Instruction): *(?:\n\n|$)")


@dataclass
class Encoded:
    """Documents as bytes: tokens in the writer's dtype, a mask byte for each, sizes in tokens.

    weights are those of the documents in the loss; bad holds the rows that cannot be read; digests has DIGEST bytes for
    each row that is written, and rows the row itself as JSON, if it is a prompt. counts has the characters of text that
    were read. Of documents, or of pairs: empty, shortened and too_long ones; cut texts, each of which became several;
    equal pairs, whose answers are the same; bare rows, which lack a prompt or an answer.
    Of rows that are written: wordless with an empty answer, unanswered without an answer, unfinished with a last turn
    that is not the model's, blank with another empty turn, dialogues and templated for texts with turns, of RWKV's or
    another model's; thinking and at_once for those with and without, if asked; "unread NAME" for those with a text in
    a field that no document holds. counted has the tokens that count in the loss.
    """

    sizes: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    tokens: bytes = b""
    mask: bytes = b""
    continues: bool = False
    bad: BadRows = field(default_factory=BadRows)
    digests: bytes = b""
    rows: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add_counts(self, other: "Encoded") -> None:
        """Add another's counts, bad rows and rows, but not its documents."""
        self.counts.update(other.counts)
        self.bad.add_all(other.bad)
        self.rows += other.rows

    def drop(self, dropped: np.ndarray) -> None:
        """Leave out documents, of rows that are a document each."""
        tokens = np.repeat(~dropped, self.sizes)
        wide = len(self.tokens) // max(1, len(tokens))
        self.tokens = np.frombuffer(self.tokens, f"V{wide}")[tokens].tobytes()
        self.mask = np.frombuffer(self.mask, np.uint8)[tokens].tobytes()
        self.sizes = np.array(self.sizes)[~dropped].tolist()
        self.weights = np.array(self.weights)[~dropped].tolist()

    def to_json(self) -> dict[str, Any]:
        """The counts and bad rows, for from_json."""
        return {"counts": self.counts, "bad": [self.bad.counts, self.bad.first]}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Encoded":
        counts, first = content["bad"]
        result = Encoded(counts=Counter({name: int(count) for name, count in content["counts"].items()}))
        result.bad.counts = Counter({kind: int(count) for kind, count in counts.items()})
        result.bad.first = {kind: visible(first[kind]) for kind in counts}
        return result


def encode_chunk(chunk: Chunk, settings: EncodeSettings, judge: bool = False) -> Encoded:
    """Encode a chunk; with judge, only look for bad rows and make no documents."""
    return encoder(settings).encode(chunk, judge)


@lru_cache(maxsize=4)
def encoder(settings: EncodeSettings) -> "Encoder":
    """The Encoder of these settings, made once in each process."""
    return Encoder(settings)


class Encoder:
    """A tokenizer and a template, ready to encode chunks."""

    def __init__(self, settings: EncodeSettings) -> None:
        self.settings, self.kind, self.remedies = settings, settings.command, REMEDIES[settings.command]
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
                "--template and --think both set the opening of an answer; write it into the template, as in the "
                "templates think and no-think"
            )
        self.layout: Callable[[object, str], Documents]
        clean = settings.clean_turns
        if own := LAYOUTS.get(settings.command):
            self.layout = lambda row, think: own(row, settings.fields, think, clean)
        elif settings.template:
            template = Template(settings.template, clean)
            self.layout = lambda row, think: [template(row)]
        elif settings.fields:
            self.layout = lambda row, think: [named_segments(row, settings.fields, think, clean)]
        else:
            self.layout = lambda row, think: [segments(row, think, clean)]

    def documents(self, row: object) -> Documents:
        """The documents of a row. If thinking is asked for and the row holds none, its answer is laid out as one at
        once; if either answer of a pair holds none, both are, because they answer the same prompt."""
        found = self.layout(row, self.settings.think)
        if self.settings.think != "on" or all(map(thinks, self.told(found))):
            return found
        return self.layout(row, "off")

    def told(self, documents: list[Any]) -> list[Any]:
        """Those of a row's documents that ask and answer: all but a context."""
        return documents[1:] if self.kind == "contexts" else documents

    def encode(self, chunk: Chunk, judge: bool = False) -> Encoded:
        result = Encoded(continues=chunk.continues and not self.settings.max_tokens)
        tokens, mask, digests = array(self.code), bytearray(), bytearray()
        for offset, item in enumerate(chunk.items):
            if isinstance(item, bytes) and not item.strip():
                continue
            try:
                whole = isinstance(item, str) and self.kind in ("preprocess", "train")
                row: Any = None if whole else parse(item)
                if isinstance(row, dict):
                    row = Fields(row)
                    if self.kind in ALIKE and not self.settings.template:
                        refuse_compared(row, bool(self.settings.fields))
                documents = [[(str(item), True)]] if whole else self.documents(row)
                weight = 1.0 if self.settings.template or self.kind == "prompts" else weight_of(row, self.kind)
                undesirable = self.kind == "labels" and not label_of(row, self.settings.fields)
                if self.kind in ("pairs", "labels") and not all(map(asked_and_answered, documents)):
                    result.counts["bare"] += 1
                    continue
                convert: Callable[[str], list[int]] = judged if judge else self.tokenizer.encode
                pieces = [[(convert(text), counts) for text, counts in document] for document in documents]
                added = not judge and self._add(pieces, chunk, result, tokens, mask)
            except UserError as error:
                more = self._remedy(chunk.source) if isinstance(error, UnknownForm) else ""
                result.bad.add(f"{chunk.source}, {chunk.unit} {chunk.first + offset}", f"{error}{more}")
                continue
            result.counts["characters"] += sum(len(text) for document in documents for text, _ in document)
            if added and not whole:
                self._count(self.told(documents), result.counts)
                result.counts.update(f"unread {name}" for name in unread(row, self.settings.think))
                size = sum(result.sizes[-len(documents) :])
                result.weights[-1] = weight
                if undesirable:
                    mask[-size:] = mask[-size:].replace(b"\1", bytes([UNDESIRABLE]))
                if self.kind == "prompts":
                    result.rows.append(json.dumps(row, ensure_ascii=False, default=str))
                written = tokens[len(tokens) - size :].tobytes()
                digests += hashlib.blake2b(written, digest_size=DIGEST).digest()
        result.counts["counted"] = len(mask) - mask.count(0)
        result.tokens, result.mask, result.digests = tokens.tobytes(), bytes(mask), bytes(digests)
        return result

    def _remedy(self, source: str) -> str:
        """The end of the message about a row of a file whose fields are not known."""
        header = HEADER if source.endswith(CSV_ENDINGS) else ""
        return "" if self.settings.template else f"; {self.remedies.unknown_form}{header}"

    def _count(self, documents: Documents, counts: Counter[str]) -> None:
        """Count what report.py tells of a row that is written."""
        learned = [[text for text, is_learned in document if is_learned] for document in documents]
        if not all(learned):
            counts["unanswered"] += self.kind != "prompts"
        elif not all(text.strip() or text == TURN_END for one in learned for text in one):
            counts["wordless"] += 1
        else:
            counts["unfinished"] += any(map(ends_with_another, documents))
        counts["blank"] += any(map(has_empty_turn, documents))
        (text, is_learned), *more = documents[0]
        counts["dialogues"] += is_learned and not more and bool(opening_within(text))
        counts["templated"] += is_learned and not more and any(map(text[:400].__contains__, FOREIGN_MARKS))
        if self.settings.think == "on":
            counts["thinking" if thinks(documents[0]) else "at_once"] += 1

    def _add(
        self, documents: list[list[Piece]], chunk: Chunk, result: Encoded, tokens: "array[int]", mask: bytearray
    ) -> bool:
        """Append the documents of a row, or a piece of one, [(ids, counts)] each, to the chunk's tokens and mask; ->
        False if they are left out. Raises UserError for a context that is too long."""
        if not chunk.continues and not any(ids for pieces in documents for ids, _ in pieces):
            result.counts["empty"] += 1
            return False
        if self.kind == "pairs" and documents[0] == documents[1]:
            result.counts["equal"] += 1
            return False
        if self.end_id is not None and chunk.ends:
            for pieces in self.told(documents):
                pieces.append(([self.end_id], pieces[-1][1]))
        read_at_once = sum if self.kind == "contexts" else max
        longest, limit = read_at_once(map(length, documents)), self.settings.max_tokens
        if limit and longest > limit:
            if self.settings.too_long == "skip":
                result.counts["too_long"] += 1
                return False
            if self.kind == "contexts":
                raise UserError(
                    f"the context with its question and answer has {longest:,} tokens, and --ctx_len {limit - 1:,} is "
                    f"the most; this row needs --ctx_len {longest - 1}: take what the longest needs, shorter contexts, "
                    "or --sft_long skip to leave such rows out"
                )
            is_text = isinstance(chunk.items[0], str)
            if is_text:
                documents = windows(documents[0], limit)
            else:
                documents = [shorten(pieces, longest - limit, limit) for pieces in documents]
            result.counts["cut" if is_text else "shortened"] += 1
        for pieces in documents:
            for ids, counts in pieces:
                tokens += array(self.code, ids)  # faster than extend(ids)
                mask.extend((b"\1" if counts else b"\0") * len(ids))
            result.sizes.append(length(pieces))
            result.weights.append(1.0)
        return True


def unread(row: Fields, think: str) -> list[str]:
    """The fields whose text is in no document of a row, and those of its turns with thinking that is not asked for."""
    turns = [turn for name in TURNS if name in row.read for turn in as_list(row.peek(name)) if isinstance(turn, dict)]
    thought = [name for name in FIELDS if not think and any(turn.get(name) for turn in turns)]
    return list(dict.fromkeys([*row.unread(), *thought]))


def judged(text: str) -> list[int]:
    """Return no tokens. Raises UserError for a text that is not Unicode."""
    utf8(text)
    return []


def asked_and_answered(document: list[Segment]) -> bool:
    """Return whether a document begins with a text that does not count, and has words that do."""
    (prompt, counts), *_ = document
    return bool(prompt and not counts) and any(text.strip() for text, counts in document if counts)


def ends_with_another(document: list[Segment]) -> bool:
    """Return whether the last turn of a document is not the model's."""
    return len(document) > 1 and document[-2][0] in OTHERS


def has_empty_turn(document: list[Segment]) -> bool:
    """Return whether a turn before an answer of a document has no words."""
    turns = (text if not counts or text == TURN_END or text.endswith(":") else "…" for text, counts in document)
    return EMPTY_TURN.search("".join(turns)) is not None


def parse(item: object) -> Any:
    """Parse a line of JSON; a row that is already read stays as it is. Raises UserError for a line that is not JSON,
    and the UserError that stands for a row that could not be read."""
    if isinstance(item, UserError):
        raise item
    if not isinstance(item, bytes):
        return item
    try:
        return json.loads(item)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 ({error.reason}); {TO_UTF_8}") from error
    except (ValueError, RecursionError) as error:
        more = ", and no comma behind it" if item.rstrip().endswith(b",") else ""
        if item.lstrip()[:1] not in (b"{", b"["):
            more = "; the name of a table ends in .csv, and that of a text in .txt"
        raise UserError(f"not JSON ({error}); a .jsonl file holds one JSON object a line{more}") from error
