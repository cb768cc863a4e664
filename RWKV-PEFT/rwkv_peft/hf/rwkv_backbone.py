"""An RWKV up to its head, as transformers calls it: with an attention mask, and its State for a cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from ..cli.errors import UserError, quoted
from ..models.parts import LanguageModel
from ..models.state import State

CACHES = ("past_key_values", "cache")  # transformers' names of what a model goes on from


class Cached(ModelOutput):
    """An output whose `state` also has the names of transformers' caches: the older and the newer one."""

    state: State | None

    @property
    def past_key_values(self) -> State | None:
        return self.state

    cache = past_key_values


@dataclass
class BackboneOutput(Cached):
    """last_hidden_state (B, T, C) after the last norm, the State after the tokens if use_cache is set, and n_layer + 1
    hidden_states: the embeddings, the outputs of all blocks but the last, and last_hidden_state."""

    last_hidden_state: torch.Tensor | None = None
    state: State | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class Backbone(LanguageModel):
    """A generation's model, with its parts and names, under the arguments of transformers."""

    def __init__(self, network: LanguageModel) -> None:
        nn.Module.__init__(self)
        self.config, self.grad_checkpoint = network.config, network.grad_checkpoint
        self.carried, self.tables = network.carried, network.tables
        self.emb, self.blocks, self.ln_out, self.head = network.emb, network.blocks, network.ln_out, network.head

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        state: State | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **others: Any,
    ) -> BackboneOutput:
        """Compute tokens (B, T), which go on from state -> BackboneOutput, with output_hidden_states all hidden states.

        attention_mask (B, T or more) keeps any tokens of a row; results for the others are zeros before the norm.
        position_ids (1 or B, T) that begin anew at 0 separate the sequences packed in a row, which see nothing of each
        other. `others` may name a cache past_key_values or cache; raises UserError for arguments without an effect.
        """
        state = refuse_others(state, others)
        keep = not self.training if use_cache is None else use_cache
        hidden = list[torch.Tensor]()
        x = self.emb(input_ids) if inputs_embeds is None else inputs_embeds
        mask = x.new_ones(x.shape[:2], dtype=torch.bool)
        if attention_mask is not None:
            mask = attention_mask[:, -x.shape[1] :].bool()
        begins = None if position_ids is None else packed_begins(position_ids, mask)
        if begins is not None or (attention_mask is not None and not mask.all()):
            if begins is not None and state is not None:
                raise UserError("position_ids begin a sequence anew within a row, and state goes on; leave one out")
            keep = keep and begins is None
            x, after = self._through_kept(x, mask, begins, state, keep, input_ids, hidden)
            hidden = [scattered(one, mask) for one in hidden]
        else:
            x, after = self.through_blocks(x, state, None, keep, input_ids, hidden=hidden)
        last = self.ln_out(x)
        return BackboneOutput(last, after if keep else None, (*hidden, last) if output_hidden_states else None)

    def _through_kept(
        self,
        x: torch.Tensor,
        mask: torch.Tensor,
        begins: torch.Tensor | None,
        state: State | None,
        keep: bool,
        ids: torch.Tensor | None,
        hidden: list[torch.Tensor],
    ) -> tuple[torch.Tensor, State]:
        """Compute the blocks over the tokens of x (B, T, C) that mask (B, T) keeps, as one packed row -> x, zeros
        elsewhere, and the State after them; a row without any keeps its state. Sequences begin at each row's first
        token, and where begins (B, T) is set. `hidden` gets each block's packed input."""
        rows = mask.any(1).nonzero()[:, 0]
        borders = F.pad(mask.sum(1)[rows].cumsum(0), (1, 0))
        if begins is not None:
            borders = torch.cat([borders, begins[mask].nonzero()[:, 0]]).unique()
        begun = None if state is None else state.selected(rows)
        tokens = None if ids is None else ids[mask][None]
        y, after = self.through_blocks(x[mask][None], begun, borders, keep, tokens, hidden=hidden)
        if keep and len(rows) < len(mask):
            before = State.zeros(self.config, 1, x.device, x.dtype).repeated(len(mask)) if state is None else state
            after = before.repeated(1).put(rows, after)  # in a copy
        return scattered(y, mask), after


def scattered(packed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The rows of packed (1, n, C) at the n places of mask (B, T), zeros elsewhere: (B, T, C)."""
    return packed.new_zeros(*mask.shape, packed.shape[-1]).index_put((mask,), packed[0])


def refuse_others(state: State | None, others: Mapping[str, Any]) -> State | None:
    """The State that goes on: `state`, or the one under a cache's name in `others`. Raises UserError for a cache of
    another kind, and for an argument that is neither None nor False and that an RWKV cannot honour."""
    for name, value in others.items():
        if value is None or value is False:
            continue
        if name not in CACHES:
            raise UserError(
                f"{name}={quoted(value)}: an RWKV here takes no such argument, and gives its last hidden state and its "
                "state; leave it out"
            )
        if not isinstance(value, State):
            raise UserError(
                f"{name} holds a {type(value).__name__}, and an RWKV has no keys and values; give the state of an "
                "earlier call, and in place of prefix tuning another method, or tune states with train.py"
            )
        state = value
    return state


def packed_begins(positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
    """Where position_ids (1 or B, T) begin a sequence anew within a row's tokens that mask (B, T) keeps: (B, T), or
    None if nowhere. Raises UserError for positions that jump."""
    if positions.dim() != 2 or positions.shape[0] not in (1, len(mask)) or positions.shape[1] != mask.shape[1]:
        raise UserError(f"position_ids {tuple(positions.shape)} are due for tokens {tuple(mask.shape)}, one for each")
    positions = positions.expand_as(mask)
    kept, rows = positions[mask], mask.nonzero()[:, 0]
    anew = (kept[1:] == 0) & (rows[1:] == rows[:-1])
    if not (anew | (kept[1:] == kept[:-1] + 1) | (rows[1:] != rows[:-1])).all():
        raise UserError(
            "position_ids jump, and an RWKV reads tokens one after another; count up by one, and begin packed "
            "sequences at 0, or leave them out"
        )
    return None if not anew.any() else torch.zeros_like(mask).index_put((mask,), F.pad(anew, (1, 0)))
