"""Makes the tensors of a batch from samples, each a document or, if they are packed, a list of documents."""

from collections.abc import Sequence

import torch

from .masks import undesirable

Document = tuple[torch.Tensor, torch.Tensor]  # its tokens (T + 1,) and its mask (T,)
Sample = Document | list[Document]


def collate(rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Make a batch: [(tokens (T_i + 1,), mask (T_i,))] -> tokens, targets, mask (B, T), T the longest, and counted; and
    weights (B, T), if the masks are weights.

    Rows that are lists of such documents give (1, sum of T_i) and cu_seqlens.
    """
    packed = [document for row in rows if isinstance(row, list) for document in row]
    if packed:
        return collate_packed(packed)
    documents = [row for row in rows if isinstance(row, tuple)]
    length = max(len(mask) for _, mask in documents)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.zeros_like(tokens)
    weigh = any(mask.is_floating_point() for _, mask in documents)  # of a mixture perhaps some
    mask = torch.zeros(len(rows), length, dtype=torch.float32 if weigh else documents[0][1].dtype)
    for row, (sequence, counted) in enumerate(documents):
        size = len(counted)
        tokens[row, :size], targets[row, :size], mask[row, :size] = sequence[:-1], sequence[1:], counted
    return {"tokens": tokens, "targets": targets} | told(mask)


def collate_packed(documents: Sequence[Document]) -> dict[str, torch.Tensor]:
    """[(tokens (T_i + 1,), mask (T_i,))] -> tokens, targets, mask (1, sum of T_i), counted, cu_seqlens (n + 1,); and
    weights (1, sum of T_i), or labels (n,), if the masks tell them."""
    masks = [mask for _, mask in documents]
    batch = {
        "tokens": torch.cat([tokens[:-1] for tokens, _ in documents])[None],
        "targets": torch.cat([tokens[1:] for tokens, _ in documents])[None],
        "cu_seqlens": torch.tensor([0, *map(len, masks)]).cumsum(0),
        **told(torch.cat(masks)[None]),
    }
    if masks[0].dtype == torch.uint8:
        batch["labels"] = torch.tensor([not undesirable(mask) for mask in masks])
    return batch


def told(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Turn a mask (B, T) into entries of a batch: mask, counted, and weights if it is of weights."""
    counts = mask != 0
    found = {"mask": counts, "counted": positions(counts)}
    return found | {"weights": mask} if mask.is_floating_point() else found


def positions(mask: torch.Tensor) -> torch.Tensor:
    """The positions at which a mask (B, T) is true, in its B * T elements: int64 (n,)."""
    return mask.flatten().nonzero()[:, 0]
