"""The States of a frozen teacher after the contexts of rows: a context that many rows share is read once in a run."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...models.parts import HeadFunction
from ...models.state import State
from .forked import no_head, state_before

ROOM = 1 << 30  # bytes of main memory that States may take


def seen_by_teacher(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch that a teacher reads: the same, or if it has teacher_tokens, all that is named teacher_…, such as
    teacher_cu_seqlens and teacher_counted, in which as many tokens count as in the student's."""
    prefix = "teacher_"
    own = {name.removeprefix(prefix): tensor for name, tensor in batch.items() if name.startswith(prefix)}
    return own or batch


class Contexts:
    """Goes through a teacher, whose States after contexts it keeps in main memory, those used last, up to `room`
    bytes. Each context is read by itself, so that a resumed run finds the same bits."""

    def __init__(self, room: int = ROOM) -> None:
        self.room, self.kept = room, dict[bytes, State]()

    def laid(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors that a teacher reads of a batch behind its contexts' States: what the student reads."""
        return {f"teacher_{name}": batch[name] for name in ("tokens", "counted", "cu_seqlens")}

    def texts(self, batch: Mapping[str, Any]) -> list[torch.Tensor]:
        """The context of each row of a batch as collate makes it, on the CPU: what its teacher alone reads."""
        own, whole = batch["cu_seqlens"].diff().tolist(), batch["teacher_cu_seqlens"].tolist()
        pairs = zip(whole, whole[1:], own)
        return [batch["teacher_tokens"][0, start : stop - size] for start, stop, size in pairs]

    def through(self, model: nn.Module, seen: Mapping[str, Any], head: HeadFunction) -> torch.Tensor:
        """Go through a teacher with what it sees of a batch, behind its contexts if there are any."""
        state = state_before(model, seen) if "shared" in seen else None
        if texts := seen.get("contexts"):
            first, *others = (self.after(model, text, seen["tokens"].device) for text in texts)
            state = first.joined(*others).each(lambda name, tensor: tensor.to(seen["tokens"].device))
        return model(seen["tokens"], state, seen.get("cu_seqlens"), head, keep=False)[0]

    def after(self, model: nn.Module, text: torch.Tensor, device: torch.device) -> State:
        """A teacher's State after a context."""
        key = text.numpy().tobytes()
        state = self.kept.pop(key, None)
        if state is None:
            found = model(text[None].to(device), head=no_head)[1]
            state = found.each(lambda name, tensor: tensor.cpu().clone())
        self.kept[key] = state  # the last one used
        while len(self.kept) > 1 and sum(state.nbytes for state in self.kept.values()) > self.room:
            self.kept.pop(next(iter(self.kept)))
        return state
