"""Masks select the targets that count in the loss: all, by a .mask file, or between token markers.

A mask is a function (start, stop) -> bool (stop - start,), true for each token in [start, stop) of the data set's
stream that counts as a target; or, of documents with weights, float32: how much it counts.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..cli.errors import UserError
from ..config import DataConfig
from .binidx import UNDESIRABLE, BinidxDataset, counting

if TYPE_CHECKING:
    from torch import Tensor  # preprocess does without its import, which takes seconds

Mask = Callable[[int, int], np.ndarray]  # (start, stop) -> bool or float32 (stop - start,)
LOOK_BACK = 1 << 12  # tokens before a window that are searched first for its marker


def describe_mask(dataset: BinidxDataset, config: DataConfig) -> str:
    """A line on the tokens of a BinidxDataset that count. Raises UserError if its .mask counts none."""
    total, kind = len(dataset.tokens), config.loss_mask
    if kind in ("qa", "se"):
        return f"loss on the tokens after --mask_id {' '.join(map(str, config.mask_id))} (--loss_mask {kind})"
    if dataset.mask is None:
        return f"loss on all {total:,} tokens"
    if kind != "file":
        return f"loss on all {total:,} tokens: --loss_mask {kind} leaves {dataset.mask_path} aside"
    counted = counting(dataset.mask)
    if not counted:
        raise UserError(
            f"{dataset.mask_path} counts none of {total:,} tokens, so that there is nothing to learn; preprocess rows "
            "with answers, or take --loss_mask none"
        )
    return f"loss on {counted:,} of {total:,} tokens (answers)"


def undesirable(mask: "Tensor") -> bool:
    """True for a sample's mask of an undesirable answer; masks of weights have no labels."""
    return not mask.is_floating_point() and UNDESIRABLE in mask


def weighted(mask: Mask | None, dataset: BinidxDataset) -> Mask | None:
    """A mask times the weights of a BinidxDataset's documents, if it has any."""
    weights = dataset.weights
    if weights is None:
        return mask

    def times(start: int, stop: int) -> np.ndarray:
        first, last = dataset.document_at(start), dataset.document_at(max(start, stop - 1))
        begins = dataset.pointers[first : last + 1] // dataset.dtype.itemsize
        found = weights[first + np.searchsorted(begins, np.arange(start, stop), side="right") - 1]
        return found if mask is None else found * mask(start, stop)

    return times


def make_mask(dataset: BinidxDataset, config: DataConfig) -> Mask | None:
    """Make the mask config.loss_mask over a BinidxDataset; None if every token counts.

    "file" reads the .mask companion. "qa" counts from behind each config.mask_id (the tokens that
    open an answer) to the document's end, or up to the next config.mask_end_id (the tokens that
    open a question) if one is given; "se" counts from behind each mask_id through the next
    mask_end_id.
    """
    kind = config.loss_mask
    if kind in ("none", "pad"):
        return None
    if kind == "file":
        stored = dataset.mask
        if stored is None:
            raise UserError(
                f"--loss_mask file: {dataset.mask_path} does not exist; preprocess chat or question and "
                "answer rows, which writes it, or take --loss_mask none or qa"
            )
        return lambda start, stop: stored[start:stop] != 0
    return MarkerMask(dataset, config.mask_id, config.mask_end_id, end_counts=kind == "se")


class MarkerMask:
    """Counts the tokens between an opening marker and a closing one, document by document."""

    def __init__(self, dataset: BinidxDataset, begin: Sequence[int], end: Sequence[int], end_counts: bool) -> None:
        self.dataset, self.begin, self.end, self.end_counts = dataset, begin, end, end_counts
        if not any(len(find(dataset[i], begin)) for i in range(len(dataset))):
            raise UserError(
                f"--mask_id {' '.join(map(str, begin))}: these token ids never occur in "
                f"{dataset.bin_path}, so nothing would count; tokenize the marker together with the text "
                "around it (the World tokenizer merges it with that text)"
            )

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """The mask of [start, stop). However long the documents are, it reads back only as far as the last marker
        before `start`, or to the beginning of its document if there is none."""
        longest, back = max(len(self.begin), len(self.end)), LOOK_BACK
        beginning = self.dataset.start(self.dataset.document_at(start))
        while True:
            first = max(start - back, beginning)
            change = self._changes(first, stop)
            unsure = longest if first > beginning else 0  # a marker may lie across the edge
            change[:unsure] = 0
            if not unsure or change[unsure : start - first + 1].any():
                break
            back *= 8
        latest = np.maximum.accumulate(np.where(change != 0, np.arange(len(change)), 0))
        return change[latest][start - first :] == 1

    def _changes(self, start: int, stop: int) -> np.ndarray:
        """int8 (stop - start,): 1 where counting begins, -1 where it ends or a further document begins, else 0."""
        first, last = self.dataset.document_at(start), self.dataset.document_at(stop - 1)
        end = self.dataset.start(last) + int(self.dataset.sizes[last])
        tokens = self.dataset.tokens[start : min(stop + max(len(self.begin), len(self.end)), end)]
        begins = self.dataset.pointers[first + 1 : last + 1] // self.dataset.dtype.itemsize - start
        ends = np.append(begins, len(tokens))

        def behind(marker: Sequence[int]) -> np.ndarray:
            """The positions behind markers, only of those that lie in one document."""
            found = find(tokens, marker)
            return found[found + len(marker) <= ends[np.searchsorted(begins, found, side="right")]] + len(marker)

        change = np.zeros(len(tokens) + 1, dtype=np.int8)
        if self.end:
            change[behind(self.end) - (0 if self.end_counts else len(self.end))] = -1
        change[behind(self.begin)] = 1
        change[begins] = -1
        return change[: stop - start]


def find(tokens: np.ndarray, pattern: Sequence[int]) -> np.ndarray:
    """The positions in tokens (n,) where the id sequence `pattern` begins."""
    count = len(tokens) - len(pattern) + 1
    if count <= 0:
        return np.zeros(0, dtype=np.int64)
    hit = tokens[:count] == pattern[0]
    for offset, token in enumerate(pattern[1:], start=1):
        hit &= tokens[offset : offset + count] == token
    return np.flatnonzero(hit)
