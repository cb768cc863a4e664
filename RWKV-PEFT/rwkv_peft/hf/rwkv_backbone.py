"""An RWKV up to its head, as transformers calls it: with an attention mask, and its State for a cache."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from ..errors import UserError
from ..models.parts import LanguageModel
from ..models.state import State


@dataclass
class BackboneOutput(ModelOutput):
    """last_hidden_state (B, T, C) after the last norm, and the State after the tokens if use_cache is set."""

    last_hidden_state: torch.Tensor | None = None
    state: State | None = None


class Backbone(LanguageModel):
    """A generation's model, whose parts and names it has, under the arguments of transformers."""

    def __init__(self, network: LanguageModel) -> None:
        nn.Module.__init__(self)
        self.config, self.grad_checkpoint = network.config, network.grad_checkpoint
        self.carried, self.sees_tokens = network.carried, network.sees_tokens
        self.emb, self.blocks, self.ln_out, self.head = network.emb, network.blocks, network.ln_out, network.head

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        state: State | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **settings: Any,
    ) -> BackboneOutput:
        """Compute tokens (B, T), which go on from state -> BackboneOutput.

        attention_mask (B, T or more) keeps any tokens of a row; results for the others are zeros before the norm.
        Without a mask, position_ids (1, T) that begin anew at 0 tell sequences packed in a row, which see nothing of
        each other. Raises UserError if hidden states or attentions are asked for.
        """
        for name in ("output_hidden_states", "output_attentions"):
            if settings.get(name):
                raise UserError(f"{name}=True: an RWKV here gives its last hidden state and its state; leave it out")
        keep = not self.training if use_cache is None else use_cache
        x = self.emb(input_ids) if inputs_embeds is None else inputs_embeds
        seen = (input_ids,) if self.sees_tokens and input_ids is not None else ()
        mask = None if attention_mask is None else attention_mask[:, -x.shape[1] :].bool()
        if mask is not None and not mask.all():
            x, after = self._through_kept(x, mask, state, keep, seen)
        else:
            starts = packed_starts(settings.get("position_ids")) if mask is None and state is None else None
            keep = keep and starts is None
            x, after = self.through_blocks(x, state, starts, keep, seen)
        return BackboneOutput(self.ln_out(x), after if keep else None)

    def _through_kept(
        self, x: torch.Tensor, mask: torch.Tensor, state: State | None, keep: bool, seen: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, State]:
        """Compute the blocks over the tokens of x (B, T, C) that mask (B, T) keeps, as one packed row -> x, zeros
        elsewhere, and the State after them; a row without any keeps its state."""
        rows = mask.any(1).nonzero()[:, 0]
        borders = F.pad(mask.sum(1)[rows].cumsum(0), (1, 0))
        begun = None if state is None else state.selected(rows)
        y, after = self.through_blocks(x[mask][None], begun, borders, keep, tuple(ids[mask][None] for ids in seen))
        if keep and len(rows) < len(mask):
            before = State.zeros(self.config, 1, x.device, x.dtype).repeated(len(mask)) if state is None else state
            after = before.repeated(1).put(rows, after)  # in a copy
        return torch.zeros_like(x).index_put((mask,), y[0]), after


def packed_starts(positions: torch.Tensor | None) -> torch.Tensor | None:
    """The borders (n + 1,) of n > 1 sequences packed in one row, whose positions (1, T) begin anew at 0; None for
    another row."""
    if positions is None or positions.dim() != 2 or len(positions) != 1:
        return None
    starts = (positions[0] == 0).nonzero()[:, 0]
    return F.pad(starts, (0, 1), value=positions.shape[1]) if len(starts) > 1 and starts[0] == 0 else None
