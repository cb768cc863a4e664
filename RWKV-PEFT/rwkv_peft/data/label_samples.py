"""Samples of labelled answers: a prompt with its answer, and with the answer of another row."""

import numpy as np
import torch

from ..cli import counted
from ..errors import UserError
from .binidx import BinidxDataset
from .collate import Document
from .masks import Mask
from .pair_samples import AnswerSamples
from .samples import Units


class LabelSamples(AnswerSamples):
    """Sample n is a list of two documents, (tokens (T + 1,), mask (T,)) each: row n, and its prompt with the answer of
    the row that comes next in the epoch, from which the model's distance to the base is estimated. A mask is uint8: 1
    or, in an undesirable answer, UNDESIRABLE (labels.py) for targets that count."""

    kind = counted = "answer"

    def __init__(self, dataset: BinidxDataset, ctx_len: int, seed: int | None, mask: Mask | None = None) -> None:
        super().__init__(dataset, ctx_len, seed, mask)
        self.notes = [f"{counted(len(self), 'labelled answer')} an epoch"]

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
        return [own, self.mismatched(own, other)]

    def labelled(self, index: int) -> Document:
        """(tokens, mask) of the row `index`."""
        start, size = self._extent(index)
        mask = self.dataset.mask
        assert mask is not None  # because a prompt does not count
        return self.document(index)[0], torch.from_numpy(np.array(mask[start + 1 : start + size]))

    def mismatched(self, own: Document, other: Document) -> Document:
        """(tokens, mask) of a row's prompt with the answer of another; a prompt too long for that loses its front."""
        prompt, (answer, counts) = own[0][: asked(own)], (part[asked(other) - 1 :] for part in other)
        answer = answer[1:]
        prompt = prompt[max(0, len(prompt) + len(answer) - self.ctx_len - 1) :]
        return torch.cat([prompt, answer]), torch.cat([counts.new_zeros(len(prompt) - 1), counts])


def asked(document: Document) -> int:
    """The number of tokens before the answer of a document; mask[i] says whether tokens[i + 1] counts."""
    return int(document[1].nonzero()[0]) + 1
