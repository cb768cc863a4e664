"""Prefixes that several rows share are computed once: the prompt of answers in a batch, a teacher's contexts in a run.

A recurrent model's prompt is a State, from which any number of answers start. The gradients that they have for it add
up. They go back through the prompt once.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from ...config import RunConfig
from ...data.samples import Samples, positions
from ...models.parts import HeadFunction
from ...models.state import State
from ...ops.products import matmul

WORTH, GPU_WORTH = 64, 4096  # saved tokens that are worth a further pass; on a GPU by a count of its launches
LOOKED_AT = 64  # samples
ROOM = 1 << 30  # bytes of main memory for States after contexts
TEACHER = "teacher_"  # prefix of a batch's entries that only a teacher reads
Batch = Mapping[str, Any]


def saved_tokens(config: RunConfig, samples: Samples, accelerator: str) -> int:
    """The mean number of tokens that shared prompts save a micro batch; 0 if they are not to be shared.

    They are not if rows share none, flags forbid it, or it is not worth a further pass. All ranks and resumed runs
    agree.
    """
    data, train = config.data, config.train
    if data.documents == 1 or data.of_prompts or train.share_prompts is False:
        return 0
    batches = [samples.collate([samples[n]]) for n in range(0, len(samples), -(-len(samples) // LOOKED_AT))]
    saved = [batch["tokens"].numel() - tokens_read(batch | share_prefixes(batch, data.documents)) for batch in batches]
    mean = max(0, sum(saved) * data.micro_bsz // len(saved))
    return mean if train.share_prompts or mean >= (GPU_WORTH if accelerator == "gpu" else WORTH) else 0


def tokens_read(batch: Batch) -> int:
    """The number of tokens that a forward over a batch reads, padding included."""
    parts: Sequence[Batch] = batch.get("parts", [batch])  # of sampled completions
    return sum(part[name].numel() for part in parts for name in ("tokens", "shared") if name in part)


def share_prefixes(batch: Batch, size: int) -> dict[str, torch.Tensor]:
    """Lay out a packed batch (on the CPU) so that the common prefix of each `size` documents stands there once.

    The result has the tensors that change, because documents lack their prefix, and besides

    - shared: int64 (1, P), the prefix of each group: tokens before its first counted target, never a whole document
    - shared_seqlens: int64 (groups + 1,): the positions at which the groups begin, and the end
    - owner: int64 (documents,): the group of each document

    No sequence may be empty. So if a group shares nothing, documents stay whole, shared is one token and owner is
    empty. Ranks then still enter the same modules in the same order.
    """
    bounds = batch["cu_seqlens"].tolist()
    documents = [slice(*pair) for pair in zip(bounds, bounds[1:])]
    groups = [documents[first : first + size] for first in range(0, len(documents), size)]
    lengths = [prefix_length(batch, group) for group in groups]
    # One group without a prefix would be an empty sequence among the shared ones.
    if not all(lengths):
        return {"shared": batch["tokens"][:, :1], "shared_seqlens": torch.arange(2), "owner": torch.arange(0)}
    owner = torch.arange(len(documents)) // size
    rests = [slice(document.start + lengths[group], document.stop) for document, group in zip(documents, owner)]
    laid = {name: joined(batch[name], rests) for name in ("tokens", "targets", "mask")}
    laid |= {"counted": positions(laid["mask"]), "cu_seqlens": bounds_of(rests), "owner": owner}
    shared = [slice(group[0].start, group[0].start + length) for group, length in zip(groups, lengths)]
    return laid | {"shared": joined(batch["tokens"], shared), "shared_seqlens": bounds_of(shared)}


def prefix_length(batch: Batch, group: Sequence[slice]) -> int:
    """The number of tokens in the common prefix of the documents at some places of a packed batch."""
    most = min(uncounted(batch["mask"][0, place]) for place in group)
    rows = torch.stack([batch["tokens"][0, place][:most] for place in group])  # (documents, most)
    return int((rows == rows[0]).all(0).long().cumprod(0).sum())  # 1 up to the first difference, then 0


def uncounted(mask: torch.Tensor) -> int:
    """The number of targets of a document's mask (T,) before the first that counts, or the last."""
    counted = mask.nonzero()
    return int(counted[0]) if len(counted) else len(mask) - 1


def joined(row: torch.Tensor, places: Iterable[slice]) -> torch.Tensor:
    """Concatenate places of a row (1, T)."""
    return torch.cat([row[:, place] for place in places], 1)


def bounds_of(places: Iterable[slice]) -> torch.Tensor:
    """The cu_seqlens (n + 1,) of n concatenated places."""
    return torch.tensor([0, *accumulate(place.stop - place.start for place in places)])


def prefix_states(model: nn.Module, batch: Batch) -> State:
    """The State from which each document of share_prefixes starts, computed once for each group."""
    _, state = model(batch["shared"], cu_seqlens=batch["shared_seqlens"], head=no_head)
    return state.each(lambda name, tensor: GatherRows.apply(tensor, batch["owner"]))


def no_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The head of passes that need only the state: one zero instead of logits."""
    return x.new_zeros(())


class GatherRows(torch.autograd.Function):
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


def teacher_batch(batch: Batch) -> Batch:
    """The batch that a teacher reads: its own entries teacher_… under their plain names, or the student's if none.

    As many tokens count in both.
    """
    entries = {name.removeprefix(TEACHER): value for name, value in batch.items() if name.startswith(TEACHER)}
    return entries or batch


class Contexts:
    """A frozen teacher's forward function that caches its States after contexts, the last used, in `room` bytes.

    A context that many rows share is read once in a run. It is read by itself: a resumed run gets the same bits.
    """

    def __init__(self, room: int = ROOM) -> None:
        self.room, self.cache = room, dict[bytes, State]()

    def split(self, batch: Batch) -> dict[str, Any]:
        """A batch as collate makes it (on the CPU) -> (each row's context, the teacher's entries after it)."""
        lengths, teacher_lengths = batch["cu_seqlens"].diff().tolist(), batch["teacher_cu_seqlens"].tolist()
        places = zip(teacher_lengths, teacher_lengths[1:], lengths)
        contexts = [batch["teacher_tokens"][0, start : stop - size] for start, stop, size in places]
        packed = {f"{TEACHER}{name}": batch[name] for name in ("tokens", "counted", "cu_seqlens")}
        return {**packed, f"{TEACHER}contexts": contexts}

    def forward(self, model: nn.Module, seen: Batch, head: HeadFunction) -> torch.Tensor:
        """Head's result after a teacher's forward over its batch, behind the contexts if there are any."""
        device = seen["tokens"].device
        state = prefix_states(model, seen) if "shared" in seen else None
        if contexts := seen.get("contexts"):
            first, *others = (self.state_after(model, context, device) for context in contexts)
            state = first.joined(*others).each(lambda name, tensor: tensor.to(device))
        return model(seen["tokens"], state, seen.get("cu_seqlens"), head, keep=False)[0]

    def state_after(self, model: nn.Module, context: torch.Tensor, device: torch.device) -> State:
        """A teacher's State after a context (T,), on the CPU."""
        # By its tokens and not by the row: many rows have the same context.
        key = context.numpy().tobytes()
        state = self.cache.pop(key, None)
        if state is None:
            after = model(context[None].to(device), head=no_head)[1]
            state = after.each(lambda name, tensor: tensor.cpu().clone())
        # Put in anew at each use: a dict keeps the order, so that the first is the one that was not used for longest.
        self.cache[key] = state  # the last one used
        while len(self.cache) > 1 and sum(state.nbytes for state in self.cache.values()) > self.room:
            self.cache.pop(next(iter(self.cache)))
        return state
