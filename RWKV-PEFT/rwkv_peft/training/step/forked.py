"""Compute once what documents begin with alike: answers to a prompt go on from one State.

A recurrent model's prompt is a State, from which any number of answers start. The gradients that they have
for it add up, and go back through the prompt once.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from ...config import RunConfig
from ...data.samples import Samples, positions
from ...models.state import State
from ...ops.products import matmul
from ...ops.recurrence.signature import vouch
from .segments import sent

WORTH, GPU_WORTH = 64, 4096  # saved tokens that are worth a further pass; on a GPU by a count of its launches
LOOKED_AT = 64  # samples
Batch = Mapping[str, torch.Tensor]


def saved_tokens(config: RunConfig, samples: Samples, accelerator: str) -> int:
    """The tokens that a micro batch saves in the mean if prompts are computed once; 0 if they are not, because rows
    share none, flags say so, or it is not worth a further pass. All ranks and resumed runs find the same."""
    data, train = config.data, config.train
    if data.documents == 1 or data.of_prompts or train.share_prompts is False:
        return 0
    batches = [samples.collate([samples[n]]) for n in range(0, len(samples), -(-len(samples) // LOOKED_AT))]
    saved = [batch["tokens"].numel() - tokens_read(batch | forked(batch, data.documents)) for batch in batches]
    mean = max(0, sum(saved) * data.micro_bsz // len(saved))
    return mean if train.share_prompts or mean >= (GPU_WORTH if accelerator == "gpu" else WORTH) else 0


def tokens_read(batch: Mapping[str, Any]) -> int:
    """The number of tokens that a pass over a batch reads, padding included."""
    parts: Sequence[Batch] = batch.get("parts", [batch])  # of drawn answers
    return sum(part[name].numel() for part in parts for name in ("tokens", "shared") if name in part)


def forked(batch: Batch, size: int) -> dict[str, torch.Tensor]:
    """Lay out a batch of packed documents (of collate, on the CPU), so that what each group of `size` documents begins
    with stands there once -> the tensors that change, because documents lack what they share, and besides

    - shared: int64 (1, P), the tokens that each group shares: equal ones before its first target that counts, and never
      a whole document
    - shared_seqlens: int64 (groups + 1,): the positions where those of each group begin, and the end
    - owner: int64 (documents,): the group of each document

    No sequence may be empty. So if a group shares nothing, documents stay whole, shared is one token, and owner is
    empty; ranks then still enter the same modules in the same order.
    """
    bounds = batch["cu_seqlens"].tolist()
    documents = [slice(*pair) for pair in zip(bounds, bounds[1:])]
    groups = [documents[first : first + size] for first in range(0, len(documents), size)]
    lengths = [shared_length(batch, group) for group in groups]
    if not all(lengths):
        return {"shared": batch["tokens"][:, :1], "shared_seqlens": torch.arange(2), "owner": torch.arange(0)}
    owner = torch.arange(len(documents)) // size
    rests = [slice(document.start + lengths[group], document.stop) for document, group in zip(documents, owner)]
    laid = {name: joined(batch[name], rests) for name in ("tokens", "targets", "mask")}
    laid |= {"counted": positions(laid["mask"]), "cu_seqlens": bounds_of(rests), "owner": owner}
    shared = [slice(group[0].start, group[0].start + length) for group, length in zip(groups, lengths)]
    return laid | {"shared": joined(batch["tokens"], shared), "shared_seqlens": bounds_of(shared)}


def shared_length(batch: Batch, group: Sequence[slice]) -> int:
    """The number of tokens that the documents at some places of a packed batch share."""
    most = min(uncounted(batch["mask"][0, place]) for place in group)
    rows = torch.stack([batch["tokens"][0, place][:most] for place in group])
    return int((rows == rows[0]).all(0).long().cumprod(0).sum())


def uncounted(mask: torch.Tensor) -> int:
    """The number of targets of a document's mask (T,) before the first that counts, or the last."""
    counted = mask.nonzero()
    return int(counted[0]) if len(counted) else len(mask) - 1


def joined(row: torch.Tensor, places: Iterable[slice]) -> torch.Tensor:
    return torch.cat([row[:, place] for place in places], 1)


def bounds_of(places: Iterable[slice]) -> torch.Tensor:
    """The cu_seqlens (n + 1,) of n places that are joined."""
    return torch.tensor([0, *accumulate(place.stop - place.start for place in places)])


def on_device(laid: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """Copy what forked gave from the CPU to a device, where nobody then has to wait for the bounds."""
    copies = {name: sent(tensor, device) for name, tensor in laid.items()}
    for row, bounds in (
        ("tokens", "cu_seqlens"),
        ("shared", "shared_seqlens"),
        ("teacher_tokens", "teacher_cu_seqlens"),
    ):
        if row in laid:
            vouch(copies[bounds], laid[bounds], laid[row].shape[1])
    return copies


def state_before(model: nn.Module, batch: Batch) -> State:
    """The State that each document of a batch (of forked) goes on from, computed once for each group."""
    _, state = model(batch["shared"], cu_seqlens=batch["shared_seqlens"], head=no_head)
    return state.each(lambda name, tensor: Handed.apply(tensor, batch["owner"]))


def no_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Stand for the head in passes that need only the state: no logits, but one zero."""
    return x.new_zeros(())


class Handed(torch.autograd.Function):
    """tensor (groups, …), owner (n,) -> (n, …). Backward adds in the same order on every run, unlike indexing."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(owner)
        ctx.shape = tensor.shape
        return tensor[owner]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (owner,) = ctx.saved_tensors
        owned = owner == torch.arange(ctx.shape[0], device=owner.device)[:, None]  # (groups, n)
        return matmul(owned.to(grad.dtype), grad.flatten(1)).view(ctx.shape), None
