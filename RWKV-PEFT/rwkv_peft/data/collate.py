"""Makes the tensors of a batch from samples, each a document or, if they are packed, a list of documents."""

from collections.abc import Sequence

import torch

from .masks import UNDESIRABLE

Document = tuple[torch.Tensor, torch.Tensor]  # its tokens (T + 1,) and its mask (T,)
Sample = Document | list[Document]


def collate(rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Make a batch: [(tokens (T_i + 1,), mask (T_i,))] -> tokens, targets, mask (B, T), T the longest, and counted.

    Rows that are lists of such documents give (1, sum of T_i) and cu_seqlens.
    """
    packed = [document for row in rows if isinstance(row, list) for document in row]
    if packed:
        return collate_packed(packed)
    documents = [row for row in rows if isinstance(row, tuple)]
    length = max(len(mask) for _, mask in documents)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.zeros_like(tokens)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, (sequence, counted) in enumerate(documents):
        size = len(counted)
        tokens[row, :size], targets[row, :size], mask[row, :size] = sequence[:-1], sequence[1:], counted
    return {"tokens": tokens, "targets": targets, "mask": mask, "counted": positions(mask)}


def collate_packed(documents: Sequence[Document]) -> dict[str, torch.Tensor]:
    """[(tokens (T_i + 1,), mask (T_i,))] -> tokens, targets, mask (1, sum of T_i), counted, cu_seqlens (n + 1,); and
    labels (n,), if the masks are not bool, but tell them."""
    masks = [mask for _, mask in documents]
    mask = torch.cat(masks)[None] != 0
    batch = {
        "tokens": torch.cat([tokens[:-1] for tokens, _ in documents])[None],
        "targets": torch.cat([tokens[1:] for tokens, _ in documents])[None],
        "mask": mask,
        "counted": positions(mask),
        "cu_seqlens": torch.tensor([0, *map(len, masks)]).cumsum(0),
    }
    if masks[0].dtype != torch.bool:
        batch["labels"] = torch.stack([(mask != UNDESIRABLE).all() for mask in masks])
    return batch


def positions(mask: torch.Tensor) -> torch.Tensor:
    """The positions at which a mask (B, T) is true, in its B * T elements: int64 (n,)."""
    return mask.flatten().nonzero()[:, 0]
