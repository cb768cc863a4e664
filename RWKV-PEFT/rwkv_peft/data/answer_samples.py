"""Samples of rows with answers: pairs, labelled answers, questions behind contexts, prompts of rollouts; and checks
of held-out rows against others."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cli.errors import UserError
from ..cli.parser import counted
from .binidx import BinidxDataset
from .masks import Mask
from .samples import Document, DocumentSamples, Sample, Samples, Units, collate_packed

ROWS = ".rows"  # the ending of the file with a document's row a line, as JSON
MOST_COMPARED = 20_000  # rows of each side that are compared, which takes a second


class RowSamples(DocumentSamples):
    """Samples of `documents` in a row (0: of one, if it has a target); `noun` names them in a note on their number."""

    documents = 2
    noun = ("row", "")

    def __init__(self, dataset: BinidxDataset, ctx_len: int, seed: int | None, mask: Mask | None = None) -> None:
        super().__init__(dataset, ctx_len, seed, mask)
        if self.documents:
            self._choose(np.arange(len(dataset) // self.documents))
        word, more = self.noun
        self.notes = [f"{counted(len(self), word)}{more}"]


class AnswerSamples(RowSamples):
    """Samples of two documents, which count as one target, because the loss is a mean over answers."""

    def count(self, n: int) -> int:
        return 1


class PairSamples(AnswerSamples):
    """Sample n is a list of two consecutive documents, (tokens (T + 1,), mask (T,)) each, the better answer first."""

    kind = counted = "pair"
    noun = ("pair", " of answers")

    def __getitem__(self, n: int) -> list[Document]:
        first = 2 * self.unit(n)
        return [self.document(first), self.document(first + 1)]


class LabelSamples(AnswerSamples):
    """Sample n is a list of two documents, (tokens (T + 1,), mask (T,)) each: row n, and its prompt with the answer of
    the row that comes next in the epoch, from which the model's distance to the base is estimated. A mask is uint8: 1
    or, in an undesirable answer, UNDESIRABLE for targets that count."""

    kind = counted = "answer"
    documents, noun = 0, ("labelled answer", "")

    def _choose(self, units: Units) -> None:
        super()._choose(units)
        if len(units) < 2:
            raise UserError(
                f"{self.dataset.prefix}: labelled answers are learned beside those of other rows, and there is only "
                f"{counted(len(units), 'row')} here; take 2 or more"
            )

    def __getitem__(self, n: int) -> list[Document]:
        epoch, position = divmod(n, len(self))
        following = epoch * len(self) + (position + 1) % len(self)
        own, other = (self.labelled(self.unit(number)) for number in (n, following))
        return [own, mismatched(own, other, self.ctx_len)]

    def labelled(self, index: int) -> Document:
        """(tokens, mask) of the row `index`."""
        start, size = self._extent(index)
        mask = self.dataset.mask
        assert mask is not None  # because a prompt does not count
        return self.document(index)[0], torch.from_numpy(np.array(mask[start + 1 : start + size]))


def mismatched(own: Document, other: Document, ctx_len: int) -> Document:
    """(tokens, mask) of a row's prompt with the answer of another; a prompt too long for that loses its front."""
    prompt, (answer, counts) = own[0][: prompt_length(own)], (part[prompt_length(other) - 1 :] for part in other)
    answer = answer[1:]
    prompt = prompt[max(0, len(prompt) + len(answer) - ctx_len - 1) :]
    return torch.cat([prompt, answer]), torch.cat([counts.new_zeros(len(prompt) - 1), counts])


def prompt_length(document: Document) -> int:
    """The number of tokens before the answer of a document, the first that counts: mask[i] is of tokens[i + 1]."""
    return int(document[1].nonzero()[0]) + 1


class ContextSamples(RowSamples):
    """Sample n is a list of two documents, (tokens (T + 1,), mask (T,)) each: a question with its answer, and the same
    behind its context; as many tokens count in both. A batch packs the former, and beside them, under names that begin
    with teacher_, the latter."""

    kind = counted = "row"
    noun = ("row", " with contexts")

    def __getitem__(self, n: int) -> list[Document]:
        first = 2 * self.unit(n)
        context, own = self.document(first)[0], self.document(first + 1)
        whole = torch.cat([context, own[0]]), torch.cat([own[1].new_zeros(len(context)), own[1]])
        return [own, whole]

    def count(self, n: int) -> float:
        return self.document_count(2 * self.unit(n) + 1)

    def collate(self, rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
        own, whole = zip(*rows)
        seen = collate_packed(whole)
        return collate_packed(own) | {f"teacher_{name}": seen[name] for name in ("tokens", "counted", "cu_seqlens")}


class PromptSamples(RowSamples):
    """Sample n is a prompt without tokens that count; it is one target, because the loss is a mean over prompts. A
    reward reads its row."""

    kind = counted = "prompt"
    documents, noun = 1, ("prompt", "")
    step = times = 1

    def __init__(self, dataset: BinidxDataset, ctx_len: int, seed: int | None, mask: Mask | None = None) -> None:
        super().__init__(dataset, ctx_len, seed, mask)
        self.rows = Path(dataset.prefix + ROWS).read_bytes().splitlines()

    def repeat(self, step: int, times: int) -> None:
        """Visit the prompts of a step of so many samples in `times` steps, one after the other."""
        self.step, self.times = step, times

    def original(self, n: int) -> int:
        """The number of sample n without repetition: equal numbers share their answers."""
        return n // (self.step * self.times) * self.step + n % self.step

    def __len__(self) -> int:
        number = len(self.units)
        return number if self.times == 1 else -(-number // self.step) * self.step * self.times

    def unit(self, n: int) -> int:
        return self.place(self.original(n))

    def count(self, n: int) -> int:
        return 1

    def place(self, original: int) -> int:
        """The document of an original sample: its place among the rows that were read, from 0."""
        return super().unit(original)

    def prompt(self, original: int) -> list[int]:
        """The tokens of an original sample."""
        return self.dataset[self.place(original)].tolist()

    def row(self, original: int) -> dict[str, Any]:
        """The row of an original sample."""
        return json.loads(self.rows[self.place(original)])


def overlap_notes(training: Samples, held_out: Samples) -> list[str]:
    """A note, as a list, if held-out rows are training rows, which lowers their loss as they are learned by heart; []
    for streams of text, which have no rows."""
    if not isinstance(training, DocumentSamples) or not isinstance(held_out, DocumentSamples):
        return []
    trained, held = set(row_keys(training)), list(row_keys(held_out))
    if not (number := sum(key in trained for key in held)):
        return []
    return [
        f"note: {number:,} of {counted(len(held), 'held-out row')} {'is a' if number == 1 else 'are'} training "
        f"{'row' if number == 1 else 'rows'} too, so that the validation loss tells less of other rows; preprocess "
        "--drop_duplicates leaves repeated rows out, or take them out of one of two files"
    ]


def row_keys(samples: Samples) -> Iterator[bytes]:
    """Yield the tokens of each row of the first samples of an epoch; of two answers in a row the first."""
    for n in range(min(len(samples), MOST_COMPARED)):
        sample = samples[n]
        documents = sample if isinstance(sample, list) else [sample]
        for tokens, _ in documents[:1] if isinstance(samples, RowSamples) else documents:
            yield tokens.numpy().tobytes()
