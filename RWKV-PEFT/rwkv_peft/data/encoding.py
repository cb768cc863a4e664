"""Rows -> tokens and masks: the settings, the encoder of chunks of rows, and its counts of rows."""

import hashlib
import json
import math
import re
import shlex
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, islice, takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..cli.errors import UserError, in_line, quoted
from ..cli.names import G1
from ..cli.parser import counted
from .binidx import UNDESIRABLE, dtype_code
from .chat import (
    LENGTHS,
    LOSS_WEIGHT,
    QUOTE,
    SPEAKERS,
    THINK,
    THINK_CLOSES,
    THINKING,
    TURN_END,
    WEIGHT,
    Segment,
    opens_thinking,
    parts_apart,
)
from .columns import ANSWERING, KNOWN, PEEKED, Columns, columns_of, folded, peeked
from .dialogues import written_turns
from .exports import chats_in, export_of, require_speaker, rows_of, speakers_in
from .feedback import is_feedback, learned_as
from .fields import LISTS, UnknownForm, unread
from .forms import ANSWER, ANSWERS, CHATS, LABELLED, SIDES, TURNS, label_of, loss_weight_of, refuse_compared, with_turns
from .layouts import RowLayout, Template
from .rows import CSV_ENDINGS, TO_UTF_8, Items
from .texts import Note
from .tokenizer import load_tokenizer
from .tools import TOOL_FORMS

Documents = list[list[Segment]]  # the documents of one row
TokenRun = tuple[list[int], bool]  # the tokens of a segment, and True if they count in the loss
# the kinds of rows with a layout of their own -> the documents of a row
LAYOUTS: Mapping[str, Callable[[RowLayout, object], Documents]] = MappingProxyType(
    {
        "pairs": RowLayout.pair,
        "labels": lambda layout, row: [layout.labelled(row)],
        "prompts": lambda layout, row: [layout.opened(row)],
        "contexts": RowLayout.in_context,
    }
)
LEARNED = ("preprocess", "train")  # the kinds of rows with a loss of tokens, in which rows may weigh
ALIKE = (*LEARNED, "contexts")  # the kinds of which every answer is learned
OTHERS = frozenset(f"{speaker}:" for speaker in SPEAKERS.values()) - {"Assistant:"}  # openings of their turns
# the kinds of rows -> the flag that names their fields, and the fields to name
NAMED = MappingProxyType(
    {
        "preprocess": ("--fields", "QUESTION ANSWER", "TEXT"),
        "train": ("--sft_field", "QUESTION ANSWER", "TEXT"),
        "pairs": ("--sft_field", "PROMPT CHOSEN REJECTED"),
        "labels": ("--sft_field", "PROMPT ANSWER LABEL"),
        "prompts": ("--sft_field", "PROMPT"),
        "contexts": ("--sft_field", "CONTEXT QUESTION ANSWER"),
    }
)
HEADER = "; the first line of a table names its columns: write one, such as question,answer, if it is a row"
MARK, UNREAD = "mark ", "unread "  # before a mark and a field's name in Totals.counts
MARKS = re.compile(r"<\|\w+\|>")  # which other models' templates have, and which are text here
TURNS_WITHIN = 1 << 16  # characters of a text in which turns are looked for
OTHER_MARKS = ("\0", "<start_of_turn>", "<｜User｜>", "[/INST]")
TOOL_MARKS = ("<tool_call>", "<tools>")  # of the form hermes, beside another
SHOWN_KINDS = 8  # kinds in a message
# the parts in which messages of one kind differ
VARIES = re.compile(r"(?<!\w)'(?:\\.|[^'\\])*'…?|\"(?:\\.|[^\"\\])*\"…?|\(.*\)|\d+|\b(?:None|True|False)\b|\[…\]|\{…\}")


@dataclass(frozen=True)
class EncodeSettings:
    """The settings by which rows become documents.

    - tokenizer: a name or path for load_tokenizer
    - end_token: end each document with the tokenizer's end_id
    - fields, think, clean_turns: as in a RowLayout
    - template: the text of a Template
    - skip_bad_rows: leave out rows that cannot be read, which are refused otherwise
    - max_tokens: the most that a document may have (0: no limit)
    - too_long: "left" removes tokens from the front of a longer document's prompt, and then from the end of its answer;
      "skip" leaves the document out
    - command: the kind of rows, a key of NAMED: "preprocess" and "train" read texts, questions and answers; "pairs"
      makes two documents of a row, its better and its worse answer, "labels" an answer with its label, "prompts" a
      prompt, and "contexts" its context, and its question and answer, which are never shortened
    - think_labels: with think "on", end a user's turn with the words for the length of the thinking behind it; the
      tokens below which it is short, and above which it is long
    - tool_form: a name of TOOL_FORMS
    - speaker: in a dialogue of people, the name of the one whose words are learned
    - turns_in_text: "auto" makes chats of texts and questions that hold turns
    - encoding, document_end: as in a Reading
    """

    tokenizer: str = "world"
    end_token: bool = True
    fields: tuple[str, ...] = ()
    template: str = ""
    think: str = ""
    clean_turns: bool = True
    skip_bad_rows: bool = False
    max_tokens: int = 0
    too_long: str = "left"
    command: str = "preprocess"
    think_labels: tuple[int, ...] = ()
    tool_form: str = G1
    speaker: str = ""
    turns_in_text: str = ""
    encoding: str = ""
    document_end: str = ""


class BadRows:
    """Counts of bad rows by kind, in the order of their first rows; messages of one kind differ only in VARIES."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # kind -> the place of its first row, and the message
        self.offers: list[tuple[str, str]] = []  # of those first rows, as in a UserError

    def add(self, place: str, message: str, offers: Iterable[tuple[str, str]] = ()) -> None:
        kind = VARIES.sub("…", message)
        self.counts[kind] += 1
        if kind not in self.first:
            self.first[kind] = in_line(f"{place}: {message}")
            self.offers += offers

    def __bool__(self) -> bool:
        return bool(self.counts)

    def lines(self, note: str = "") -> Iterator[str]:
        """Yield a heading, with `note` behind the count, and a line for each of the most frequent kinds."""
        total, kinds = self.counts.total(), self.counts.most_common(SHOWN_KINDS)
        which = f", of {len(self.counts)} kinds, the first of each" if len(self.counts) > 1 else ", the first of them"
        yield f"{counted(total, 'bad row')}{note}{which if total > 1 else ''}:"
        for kind, number in kinds:
            yield "  " + (f"{number:,} x  " if total > 1 else "") + self.first[kind]
        if rest := total - sum(number for _, number in kinds):
            yield f"  and {counted(rest, 'row')} of other kinds"


@dataclass
class Encoded:
    """Documents as bytes: sizes in tokens, weights in the loss, tokens in the writer's dtype, and a mask byte for each.
    digest is a hash of the tokens of a row, b"" of a text."""

    sizes: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    tokens: bytes | bytearray = field(default_factory=bytearray)
    mask: bytes | bytearray = field(default_factory=bytearray)
    digest: bytes = b""


@dataclass
class Totals:
    """Counts of all rows: the bad ones; the JSON of each row, of prompts; and counts of characters of text, of counted
    tokens, and of rows: those left out or cut by `report.left_out`, those worth a note by `report.laid_out`, and
    "unread NAME" for rows with a field that no document holds. readings are the notes on fields that columns.py takes
    for a question and an answer, with the first row of each as text; notes are those on the files."""

    bad: BadRows = field(default_factory=BadRows)
    rows: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    readings: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)


@lru_cache(maxsize=4)
def encoder(settings: EncodeSettings) -> "Encoder":
    """The Encoder of these settings, made once in each process."""
    return Encoder(settings)


class Encoder:
    """A tokenizer and a layout, which encode rows."""

    def __init__(self, settings: EncodeSettings) -> None:
        self.settings, self.kind = settings, settings.command
        self.tokenizer = load_tokenizer(settings.tokenizer)
        self.code = "H" if dtype_code(self.tokenizer.vocab_size) == 8 else "i"
        self.end_id = self.tokenizer.end_id if settings.end_token else None
        if settings.end_token and self.end_id is None:
            remedy = {"preprocess": "take", "train": "make token files with rwkv-peft preprocess"}.get(self.kind)
            raise UserError(
                f"--tokenizer {self.tokenizer.name} names no end-of-document token, which each document ends with; "
                + (f"{remedy} --no-append_eod" if remedy else "take one that does")
            )
        form = TOOL_FORMS[settings.tool_form]
        self.marks = (*OTHER_MARKS, *(TOOL_MARKS if form.name == G1 else ()))
        self.read = frozenset(  # fields that are no document's, and are read
            (
                *(WEIGHT, *CHATS, *settings.fields),
                *(chain(*SIDES) if self.kind == "pairs" else LABELLED if self.kind == "labels" else ()),
                *((*ANSWERS.values(), ANSWER) if self.kind == "prompts" else ()),
                *(THINKING if settings.think else ()),
            )
        )
        turned = bool(settings.turns_in_text)
        self.layout = RowLayout(settings.think, settings.clean_turns, form, settings.fields, turned)
        self.template = Template(settings.template, self.layout) if settings.template else None

    def documents(self, row: object) -> Documents:
        """The documents of a row. With think "on" an answer without thinking opens as with "off"; both answers of a
        pair do if either lacks it, because they share their prompt."""
        if self.template:
            return [self.template.segments(row)]
        found = self._laid_out(row, self.layout)
        if self.layout.think != "on" or all(map(opens_thinking, self.answering(found))):
            return list(map(self.with_lengths, found)) if self.settings.think_labels else found
        return self._laid_out(row, replace(self.layout, think="off"))

    def with_lengths(self, document: list[Segment]) -> list[Segment]:
        """The document with one of LENGTHS at the end of each user's turn before a thinking, unless it is there."""
        texts, (short, long) = [text for text, _ in document], self.settings.think_labels
        result = self.layout.tool_form.result
        for place, (text, counts) in enumerate(document):
            turn = place if text.startswith("User:") else place - 1  # an answer's opening may be a segment of its own
            if counts or not text.endswith(THINK["on"].opening) or (turn < place and texts[turn - 1] != "User:"):
                continue
            if result and texts[turn].startswith(f" {result}"):  # of a tool
                continue
            asked, end, opening = texts[turn].rpartition(TURN_END)
            tokens = len(self.tokenizer.encode(texts[place + 1][1:].partition(THINK_CLOSES)[0]))
            if not asked.endswith(LENGTHS):
                texts[turn] = asked + LENGTHS[(tokens >= short) + (tokens > long)] + end + opening
        return [(text, counts) for text, (_, counts) in zip(texts, document)]

    def _laid_out(self, row: object, layout: RowLayout) -> Documents:
        own = LAYOUTS.get(self.kind)
        return own(layout, row) if own else [layout.segments(row)]

    def answering(self, documents: list[Any]) -> list[Any]:
        """The documents of a row with a prompt and an answer: all but a context."""
        return documents[1:] if self.kind == "contexts" else documents

    def columns(self, path: str | Path, items: Items, counts: Counter[str]) -> tuple[Columns, Items]:
        """(the Columns of a file's items of read_rows, the items, of an export as rows of messages). Raises UserError
        if several fields may be the question or the answer, and if nothing says whose words are learned."""
        if self.settings.fields or self.template:
            return KNOWN, items
        rows, items = peeked(items, parse)
        speaker, flag = self.settings.speaker, "--as" if self.kind == "preprocess" else "--sft_as"
        try:
            if export := export_of(rows):
                chats = chats_in(items, export, parse, speaker)
                first = list(islice(chats, PEEKED)) if export.people else []
                require_speaker(speakers_in(first), export, speaker, flag)
                return KNOWN, rows_of(chain(first, chats), export, speaker, counts)
            if speaker:
                raise UserError(f"{flag} {speaker}: these rows are no dialogue of people with names; leave it out")
            return columns_of(rows, self.kind, self.settings.think), items
        except UserError as error:
            remedy = self._remedy(f"{path}, row 1", error) if isinstance(error, UnknownForm) else ""
            raise UserError(f"{path}: {error}{remedy}", offers=error.offers) from None

    def encode(self, place: str, item: object, totals: Totals, columns: Columns = KNOWN) -> Encoded | None:
        """The documents of an item of read_rows; None for one that is left out, and for a bad row, which are counted in
        `totals`."""
        if isinstance(item, bytes) and not item.strip():
            return None
        try:
            return self._encode(place, item, totals, columns)
        except UserError as error:
            remedy = self._remedy(place, error) if isinstance(error, UnknownForm) else ""
            totals.bad.add(place, f"{error}{remedy}", error.offers)
            return None

    def _remedy(self, place: str, error: UnknownForm) -> str:
        """The end of the message about a row without the fields of any form, or with those of several."""
        if self.template:
            return ""
        flag, *fields = NAMED[self.kind]
        fields = [shlex.join(names) for names in error.choices] or fields
        named = " or ".join(f"{flag} {each}" for each in fields)
        return f"; name yours, as {named}" + (HEADER if place.rpartition(", ")[0].endswith(CSV_ENDINGS) else "")

    def _encode(self, place: str, item: object, totals: Totals, columns: Columns) -> Encoded | None:
        is_text = isinstance(item, str) and self.kind in LEARNED
        holds_turns = isinstance(item, str) and is_text and bool(written_turns(item[:TURNS_WITHIN]))
        if holds_turns and self.settings.turns_in_text:
            item, is_text = {"text": item}, False
        parsed: Any = None if is_text else parse(item)
        row = columns(parsed) if columns else parsed
        if is_feedback(row) and not (self.template or self.settings.fields):
            row = learned_as(row, self.kind)
            if row is None:
                totals.counts["feedback"] += 1
                return None
        if isinstance(row, dict) and self.kind in ALIKE and not self.template:
            refuse_compared(row, bool(self.settings.fields))
        documents = [[(str(item), True)]] if is_text else self.documents(row)
        weight = 1.0 if self.template or self.kind == "prompts" else weight_of(row, self.kind)
        counts_as = UNDESIRABLE if self.kind == "labels" and not label_of(row, self.settings.fields) else 1
        if self.kind in ("pairs", "labels") and not all(map(has_prompt_and_answer, documents)):
            totals.counts["bare"] += 1
            return None
        encode = self.tokenizer.encode
        runs = self._fitted([[(encode(text), counts) for text, counts in one] for one in documents], is_text, totals)
        whole = "".join(text for document in documents for text, _ in document)
        totals.counts["texts"] += is_text
        totals.counts["turns"] += is_text and holds_turns
        totals.counts["characters"] += len(whole)
        if not runs:
            return None
        result = Encoded(list(map(length, runs)), [weight] * len(runs))
        for ids, counts in chain.from_iterable(runs):
            result.tokens += array(self.code, ids)  # faster than extend(ids)
            result.mask += bytes([counts_as if counts else 0]) * len(ids)
        totals.counts["counted"] += len(result.mask) - result.mask.count(0)
        if columns and columns.note not in totals.readings:
            totals.readings[columns.note] = whole
        totals.counts.update(MARK + mark for mark in sorted(self._marks(whole)))
        if not is_text:
            self._count(self.answering(documents), totals.counts)
            form, tag = self.layout.tool_form, TOOL_MARKS[-1]
            totals.counts["tagged"] += (
                form.name == G1 and form.listing[0] in whole and tag in str(row) and tag not in whole
            )
            totals.counts.update(UNREAD + name for name in self._unread(row, whole))
            if not (self.template or self.settings.turns_in_text):
                totals.counts["turns"] += with_turns(row, *self.settings.fields[:2]) is not row
            result.digest = hashlib.blake2b(result.tokens, digest_size=16).digest()
        if self.kind == "prompts":
            totals.rows.append(json.dumps({**parsed, **row} if columns else row, ensure_ascii=False, default=str))
        return result

    def _fitted(self, documents: list[list[TokenRun]], is_text: bool, totals: Totals) -> list[list[TokenRun]]:
        """The documents of a row with their end, no longer than allowed; [] if they are left out. Raises UserError for
        a context that is too long."""
        if not any(ids for runs in documents for ids, _ in runs):
            totals.counts["empty"] += 1
            return []
        if self.kind == "pairs" and documents[0] == documents[1]:
            totals.counts["equal"] += 1
            return []
        if self.end_id is not None:
            for runs in self.answering(documents):
                runs.append(([self.end_id], runs[-1][1]))
        read_at_once = sum if self.kind == "contexts" else max
        longest, limit = read_at_once(map(length, documents)), self.settings.max_tokens
        if not limit or longest <= limit:
            return documents
        if self.settings.too_long == "skip":
            totals.counts["too_long"] += 1
            return []
        if self.kind == "contexts":
            raise UserError(
                f"the context with its question and answer has {longest:,} tokens, and --ctx_len {limit - 1:,} is "
                f"the most; this row needs --ctx_len {longest - 1}: take what the longest needs, shorter contexts, "
                "or --sft_long skip to leave such rows out"
            )
        if is_text:
            totals.counts["cut"] += 1
            return windows(documents[0], limit)
        totals.counts["shortened"] += 1
        return [shorten(runs, longest - limit, limit) for runs in documents]

    def _marks(self, text: str) -> set[str]:
        """The marks in a text that other models have tokens for, and zero bytes."""
        if "<" not in text and "[/" not in text and "\0" not in text:
            return set()
        marks = {*MARKS.findall(text), *(mark for mark in self.marks if mark in text)}
        return marks.difference(self.tokenizer.special)

    def _unread(self, row: Mapping[str, Any], laid_out: str) -> list[str]:
        """The fields with a text that is not among those laid out, and the fields of turns with a thinking that is
        not."""
        lists = [name for name in TURNS if isinstance(row.get(name), list)]
        read = self.read.union(lists) if lists else self.read
        if self.layout.tool_form.listing[0] in laid_out:
            read = read.union((*LISTS, "answers"))  # which are laid out in another form
        if self.kind == "prompts":
            read = read.union(name for name in row if folded(name) in ANSWERING)  # which a reward reads
        names = list(unread(row, laid_out, read))
        if lists and not self.settings.think:
            turns = [
                each for name in lists for turn in row[name] if isinstance(turn, dict) for each in parts_apart(turn)
            ]
            names += [name for name in THINKING if name not in names and any(turn.get(name) for turn in turns)]
        return names

    def _count(self, documents: Documents, counts: Counter[str]) -> None:
        """Count a row that is written for the notes of report.py."""
        learned = [[text for text, is_learned in document if is_learned] for document in documents]
        if not all(learned):
            counts["unanswered"] += self.kind != "prompts"
        elif not all(text.strip() or text == TURN_END for one in learned for text in one):
            counts["wordless"] += 1
        else:
            # whose last turn is not the model's
            counts["unfinished"] += any(len(one) > 1 and one[-2][0] in OTHERS for one in documents)
        result = self.layout.tool_form.result.rstrip()
        counts["forging"] += bool(result) and any(f" {QUOTE}{result}" in part for part, _ in documents[0])
        if self.settings.think == "on":
            counts["thinking" if opens_thinking(documents[0]) else "at_once"] += 1


def parse(item: object) -> Any:
    """The row of a line of JSON, or a row that is already read; a list is a row's turns. Raises UserError for a line
    that is not JSON, and the UserError that stands for a row that could not be read."""
    if isinstance(item, UserError):
        raise item
    row: Any = item
    if isinstance(item, bytes):
        try:
            row = json.loads(item)
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 ({error.reason}); {TO_UTF_8}") from error
        except (ValueError, RecursionError) as error:
            more = ", and no comma behind it" if item.rstrip().endswith(b",") else ""
            if item.lstrip()[:1] not in (b"{", b"["):
                more = "; the name of a table ends in .csv, and that of a text in .txt"
            raise UserError(f"not JSON ({error}); a .jsonl file holds one JSON object a line{more}") from error
    return {CHATS[0]: row} if isinstance(row, list) and {*map(type, row)} in ({str}, {dict}) else row


def weight_of(row: object, kind: str) -> float:
    """The weight of a row in the loss, times the loss_weight of its answers; 1 if it has neither. Raises UserError for
    anything but numbers from 0 on, and for kinds of rows without weights."""
    fields, product = row if isinstance(row, dict) else {}, 1.0
    for name, found in ((WEIGHT, fields.get(WEIGHT)), (LOSS_WEIGHT, loss_weight_of(fields))):
        if found is None or found == "":
            continue
        try:
            weight = float(found)
        except (TypeError, ValueError, OverflowError):
            weight = math.nan
        said, rename = f"field {name!r} holds {quoted(found)}", "rename the field if it means something else"
        if isinstance(found, bool) or not 0 <= weight < math.inf:
            raise UserError(f"{said}; a row's weight in the loss is a number from 0 on; {rename}")
        if weight != 1 and kind not in LEARNED:
            raise UserError(f"{said}, and only rows of --data_type sft weigh in the loss; leave it out, or {rename}")
        product *= weight
    return product


def has_prompt_and_answer(document: Sequence[Segment]) -> bool:
    """True if a document begins with a text that does not count, and has words that do."""
    (prompt, counts), *_ = document
    return bool(prompt and not counts) and any(text.strip() for text, counts in document if counts)


def length(runs: Sequence[TokenRun]) -> int:
    """The number of tokens of a document."""
    return sum(len(ids) for ids, _ in runs)


def windows(runs: Sequence[TokenRun], most: int) -> list[list[TokenRun]]:
    """Cut a text into documents of at most `most` tokens, which all count. Each begins with the last token of the one
    before, so that every token is predicted."""
    ids = [token for part, _ in runs for token in part]
    return [[(ids[begin : begin + most], True)] for begin in range(0, len(ids) - 1, most - 1)]


def shorten(runs: Sequence[TokenRun], excess: int, limit: int) -> list[TokenRun]:
    """Remove `excess` tokens from the front of the prompt, but not its last, then those beyond `limit` at the end."""
    prompt = sum(len(ids) for ids, _ in takewhile(lambda run: not run[1], runs))
    first, shorter = min(excess, max(prompt - 1, 0)), []  # tokens [first, first + limit) stay
    for ids, counts in runs:
        shorter.append((ids[max(first, 0) : max(first + limit, 0)], counts))
        first -= len(ids)
    return shorter
