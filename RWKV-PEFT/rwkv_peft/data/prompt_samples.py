"""Samples of prompts, which the model in training answers itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..cli import counted
from .binidx import BinidxDataset
from .masks import Mask
from .samples import DocumentSamples

ROWS = ".rows"  # the ending of the file with a document's row a line, as JSON


class PromptSamples(DocumentSamples):
    """Sample n is a prompt, a document of which no token counts; it counts as one target, because the loss is that of
    prompts. What judges its answers reads its row."""

    kind = counted = "prompt"

    def __init__(self, dataset: BinidxDataset, ctx_len: int, seed: int | None, mask: Mask | None = None) -> None:
        super().__init__(dataset, ctx_len, seed, mask)
        self._choose(np.arange(len(dataset)))
        self.rows = Path(dataset.prefix + ROWS).read_bytes().splitlines()
        self.notes = [f"{counted(len(self), 'prompt')} an epoch"]

    step = times = 1

    def repeat(self, step: int, times: int) -> None:
        """Visit the prompts of a step of so many samples in `times` steps, one after the other."""
        self.step, self.times = step, times

    def original(self, n: int) -> int:
        """The number that sample n would have if nothing was repeated: equal numbers are learned from the same
        answers."""
        return n // (self.step * self.times) * self.step + n % self.step

    def __len__(self) -> int:
        number = len(self.units)
        return number if self.times == 1 else -(-number // self.step) * self.step * self.times

    def unit(self, n: int) -> int:
        return self.place(self.original(n))

    def count(self, n: int) -> int:
        return 1

    def place(self, original: int) -> int:
        """The document that an original sample is: its place among the rows that were read, from 0."""
        return super().unit(original)

    def prompt(self, original: int) -> list[int]:
        """The tokens of an original sample."""
        tokens: list[int] = self.dataset[self.place(original)].tolist()
        return tokens

    def row(self, original: int) -> dict[str, Any]:
        """The row that an original sample was made of."""
        found: dict[str, Any] = json.loads(self.rows[self.place(original)])
        return found
