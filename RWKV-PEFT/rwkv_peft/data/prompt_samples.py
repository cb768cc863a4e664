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

    def count(self, n: int) -> int:
        return 1

    def prompt(self, n: int) -> list[int]:
        """The tokens of sample n."""
        return self.dataset[self.unit(n)].tolist()

    def row(self, n: int) -> dict[str, Any]:
        """The row that sample n was made of."""
        found: dict[str, Any] = json.loads(self.rows[self.unit(n)])
        return found
