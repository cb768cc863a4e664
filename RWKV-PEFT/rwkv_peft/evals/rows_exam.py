"""Rows of a run's own data as questions: the model answers them as it is, and its answers stand beside the rows'."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..data.collate import Document
from ..data.masks import undesirable
from ..data.mixture import Several
from ..data.samples import DocumentSamples, Samples
from ..data.templates import stops_of
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..generate.continuation import Continuation
from ..generate.loading import Subject
from .asking import GREEDY, write
from .records import Record, digest_of

LONGEST = 64  # tokens of an answer that are written and compared
OF = " of "  # between the words for data and the name of a source
SEARCHED = 16  # samples that are looked through for each row that is due


class Row(NamedTuple):
    """`of` names the data that a row is of; prompt and answer are the tokens before its last answer and those of it,
    with what ends it."""

    of: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def rows_of(of: str, samples: Samples, number: int) -> list[Row]:
    """The first `number` rows that a run reads of samples and that have a prompt and an answer; of a packed sample the
    first row. A stream has none. Several data sets share the number, and have at least one each."""
    if isinstance(samples, Several):
        each = max(1, number // len(samples.sources))
        parts = (rows_of(f"{of}{OF}{name}", part, each) for name, part in samples.sources.items())
        return [row for rows in parts for row in rows]
    samples = samples.head()
    if not isinstance(samples, DocumentSamples):
        return []
    rows: list[Row] = []
    for n in range(min(len(samples), SEARCHED * number)):
        sample = samples[n]
        found = last_answer(sample[0] if isinstance(sample, list) else sample)
        if found and len(rows) < number:
            rows.append(Row(of, *found))
    return rows


def last_answer(document: Document) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(the tokens before the last stretch that counts in the loss, those of it); None if all counts, or nothing, or an
    undesirable answer."""
    tokens, mask = document[0].tolist(), document[1].tolist()  # mask[i] says whether tokens[i + 1] counts
    if undesirable(document[1]):
        return None
    end = len(tokens)
    while end > 1 and not mask[end - 2]:
        end -= 1
    begin = end
    while begin > 1 and mask[begin - 2]:
        begin -= 1
    return (tuple(tokens[:begin]), tuple(tokens[begin:end])) if 1 < begin < end else None


class RowsExam:
    """Rows to be answered, in a tokenizer's tokens, `batch` of them at a time. Raises UserError if there are none."""

    def __init__(self, rows: Sequence[Row], tokenizer: Tokenizer, batch: int) -> None:
        if not rows:
            raise UserError("the data holds no rows of a prompt and an answer")
        self.rows, self.tokenizer, self.batch = rows, tokenizer, batch
        self.kinds = [row.of for row in rows]
        self.prompts = [tokenizer.decode(list(row.prompt)) for row in rows]
        self.stops = [stops_of(prompt) for prompt in self.prompts]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def digest(self) -> str:
        return digest_of(self.rows)

    def ask(self, model: Any, rank: int = 0, ranks: int = 1) -> Iterator[Record]:
        """{"number", "text", "end"} of every `ranks`-th row from number `rank` on, as it is answered. The model is
        asked from the states that it tunes, if any."""
        due = range(rank, len(self.rows), ranks)
        subject = Subject(model, model.tuned_states(), self.tokenizer)
        prompts, stops = [list(self.rows[n].prompt) for n in due], [self.stops[n] for n in due]
        for place, answer in write(subject, prompts, stops, GREEDY, LONGEST, self.batch):
            yield {"number": due[place], "text": answer.text, "end": answer.end}

    def answer(self, number: int) -> Record:
        """{"text", "end"} of the row's own answer, read as a model's is."""
        continuation = Continuation({}, self.tokenizer, self.stops[number])
        ends = (continuation.feed(token) for token in self.rows[number].answer[:LONGEST])
        continuation.finish(next(filter(None, ends), "length"))
        return {"text": continuation.text, "end": continuation.end}
