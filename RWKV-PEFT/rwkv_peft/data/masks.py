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
    marked = marked_tokens(dataset, config.mask_id, config.mask_end_id, end_counts=kind == "se")
    return lambda start, stop: marked[start:stop].copy()


def marked_tokens(dataset: BinidxDataset, begin: Sequence[int], end: Sequence[int], end_counts: bool) -> np.ndarray:
    """bool (n,), true for each token of a data set between an opening marker and a closing one, document by document.
    Raises UserError if there is no opening marker."""
    tokens = dataset.tokens[: len(dataset.tokens)]
    starts = dataset.pointers // dataset.dtype.itemsize

    def behind(marker: Sequence[int]) -> np.ndarray:
        """The positions behind markers, only of those that lie in one document."""
        first = find(tokens, marker)
        last = first + len(marker) - 1
        same = np.searchsorted(starts, first, side="right") == np.searchsorted(starts, last, side="right")
        return last[same] + 1

    change = np.zeros(len(tokens) + 1, dtype=np.int8)  # 1 where counting begins, -1 where it ends
    if end:
        change[behind(end) - (0 if end_counts else len(end))] = -1
    opened = behind(begin)
    if not len(opened):
        raise UserError(
            f"--mask_id {' '.join(map(str, begin))}: these token ids never occur in {dataset.bin_path}, so nothing "
            "would count; tokenize the marker together with the text around it (the World tokenizer merges it with "
            "that text)"
        )
    change[opened] = 1
    change[starts] = -1  # a document, empty ones too
    places = np.flatnonzero(change[:-1])
    return np.repeat(change[places] == 1, np.diff(places, append=len(tokens)))


def find(tokens: np.ndarray, pattern: Sequence[int]) -> np.ndarray:
    """The positions in tokens (n,) where the id sequence `pattern` begins."""
    count = len(tokens) - len(pattern) + 1
    if count <= 0:
        return np.zeros(0, dtype=np.int64)
    hit = tokens[:count] == pattern[0]
    for offset, token in enumerate(pattern[1:], start=1):
        hit &= tokens[offset : offset + count] == token
    return np.flatnonzero(hit)
