"""The parts of a model that all generations share: embedding, final norm, head, tuned states, and how they start."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..cli.errors import UserError
from ..cli.names import STATE_PARTS
from ..config import ModelConfig
from ..ops.products import linear
from .layout import SHIFT, TIME_STATE, LayerState, belongs
from .state import State, grown, swapped, turned


class Relay(Protocol):
    """Brings the states before a row's part from the process of the part before, and takes those after it on."""

    def before(self, layer: int) -> Any:
        """The state before the part at a block, of the sequences that go on from the part before; None if none does."""

    def after(self, layer: int, x: Tensor, state: Any) -> Tensor:
        """Take x (B, T, C) and the state that a block left -> x."""


HeadFunction = Callable[[Tensor, Tensor], Tensor]  # (x, the head's weight) -> a result for logits


def initial(carried: Tensor | None, tuned: Tensor | None, sequences: int) -> Tensor | None:
    """A field of the states before the first token: (sequences, …), or None for zeros. carried (m, …) or None belong to
    the first m sequences; the others begin from tuned (…), or from zeros if it is None."""
    missing = sequences - (0 if carried is None else carried.shape[0])
    if missing == 0 or (carried is None and tuned is None):
        return carried
    if tuned is None:
        assert carried is not None
        return torch.cat([carried, carried.new_zeros(missing, *carried.shape[1:])])
    # so that backward sums over the sequences in float32, also for a bfloat16 model
    fresh = tuned.to(torch.promote_types(tuned.dtype, torch.float32)).expand(missing, *tuned.shape)
    return fresh if carried is None else torch.cat([carried, fresh])


class Shifted(nn.Module):
    """A mix on token-shifted input, which may begin from a tuned last input: shift (C), or None for zeros; while
    `untrained` is set, it is zeros."""

    shift: nn.Parameter | None
    untrained = False

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter(SHIFT, None)

    def shift_begun(self, carried: Tensor | None, x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
        """The token before each sequence of x (B, T, C): (sequences, C) in x's dtype, or None for zeros. carried (m, C)
        or None belong to the first m; the others begin from shift."""
        tuned = None if self.untrained else self.shift
        shift = initial(carried, tuned, count_sequences(x, cu_seqlens))
        return shift if shift is None else shift.to(x.dtype)


class Recurrent(Shifted):
    """A time mix, which may also begin from a tuned wkv state: time_state (H, N value, N key), as in files, or None for
    zeros. rows_are_keys gives the axes of its states (Family.rows_are_keys).
    """

    rows_are_keys: bool
    time_state: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter(TIME_STATE, None)

    def begun(self, carried: Tensor | None, sequences: int) -> Tensor | None:
        """The wkv states (sequences, H, N, N) before the first token, or None for zeros. carried (m, H, N, N) or None
        belong to the first m sequences; the others begin from time_state."""
        tuned = None if self.untrained else self.time_state
        return initial(carried, swapped(tuned) if tuned is not None and self.rows_are_keys else tuned, sequences)


def count_sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of sequences in x (B, T, …): B, or the n that cu_seqlens (n + 1,) packs."""
    return x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1


class Linear(nn.Linear):
    """A linear layer, which computes as ops/products.py does."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


class Head(Linear):
    """The output projection, which can hand its weight to a function instead of forming the logits.

    A loss that walks the vocabulary in chunks needs the weight itself. It gets it through the module's forward, so that
    ZeRO-3's hooks gather the weight first.
    """

    def forward(self, x: Tensor, function: HeadFunction | None = None) -> Tensor:
        """x (B, T, C) -> logits (B, T, V), or function(x, weight)."""
        return super().forward(x) if function is None else function(x, self.weight)


class Table(nn.Embedding):
    """An embedding of a block, which may be far larger than the block: once settled, it stays in the memory that its
    file is mapped to, in the file's dtype, and only the rows of a batch's tokens go to the device (fetched)."""

    def settle(self) -> None:
        """Become a buffer, which no optimizer shards and no move or cast of the model reaches."""
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Table":
        return self if "weight" in self._buffers else super()._apply(fn, recurse)

    def forward(self, seen: Tensor) -> Tensor:
        """tokens (B, T) -> rows (B, T, width) in the table's dtype; rows that were fetched stay as they are."""
        return seen if seen.is_floating_point() else super().forward(seen)


class LanguageModel(nn.Module):
    """Embedding, blocks, norm and head, under RWKV-LM's parameter names. A generation gives its blocks,
    make_block(config, layer), called as block(x, *carried, state, cu_seqlens, *seen) -> (x, *carried, its state);
    `carried`: the first block's inputs in place of the tensors that blocks pass on besides x; and `tables`: the names
    of a block's Tables. seen are the tokens (B, T) for each of these, or rows that were fetched for them.

    grad_checkpoint recomputes each block in the backward pass instead of keeping its activations. Parameters are empty
    until `init_weights` or `load_state_dict` fills them.
    """

    make_block: Callable[[Any, int], nn.Module]
    carried: tuple[None, ...] = ()
    tables: tuple[str, ...] = ()

    def __init__(self, config: ModelConfig, grad_checkpoint: bool = False) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpoint = grad_checkpoint
        shape, device = (config.vocab_size, config.n_embd), torch.get_default_device()
        # nn.Embedding draws its values, which without memory imports torch's compiler, for 1.5 s
        self.emb = nn.Embedding(*shape, _weight=torch.empty(shape) if device.type == "meta" else None)
        self.blocks = nn.ModuleList(self.make_block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Head(config.n_embd, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        head: HeadFunction | None = None,
        keep: bool = True,
        relay: Relay | None = None,
    ) -> tuple[Tensor, State]:
        """tokens (B, T) int64, state State or None -> logits (B, T, V), State (empty unless `keep`).

        cu_seqlens (n + 1,) marks the boundaries of n sequences packed in one row (B = 1); nothing crosses them. state
        belongs to all n sequences, or to the first few; the others begin from the tuned time states, or from zeros. If
        `head` is given, head(x, weight) takes the place of the logits (see Head). A relay brings the states in place of
        `state`.
        """
        x, after = self.through_blocks(self.emb(tokens), state, cu_seqlens, keep, tokens, relay)
        return self.head(self.ln_out(x), head), after

    def through_blocks(
        self,
        x: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        keep: bool = True,
        tokens: Tensor | None = None,
        relay: Relay | None = None,
        hidden: list[Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """The part of forward between embedding and norm: x (B, T, C), tokens (B, T) for the Tables of blocks -> x
        (B, T, C), State. The states of many packed sequences are large: without `keep`, each layer's is dropped at
        once. Each block's x is appended to `hidden`."""
        carried: Sequence[Tensor | None] = self.carried
        sequences, seen = count_sequences(x, cu_seqlens), self.fetched(tokens)
        states = []
        for layer, block in enumerate(self.blocks):
            before = relay.before(layer) if relay else state[layer] if state else None
            before = before and others_begun(before, sequences)
            inputs = (x, *carried, before, cu_seqlens, *seen[layer])
            if hidden is not None:
                hidden.append(x)
            if self.grad_checkpoint and torch.is_grad_enabled():
                x, *carried, layer_state = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, *carried, layer_state = block(*inputs)
            if relay:
                x = relay.after(layer, x, layer_state)
            if keep:
                states.append(grown(before, layer_state, cu_seqlens))
            del layer_state
        return x, State(states)

    def fetched(self, tokens: Tensor | None) -> list[tuple[Tensor, ...]]:
        """Each block's further inputs: tokens (B, T) for each of its Tables, or their rows (B, T, width) on the tokens'
        device if the Table is settled on another. Copying tokens from a GPU waits for it, so that it is done once."""
        if tokens is None or not self.tables:
            return [()] * len(self.blocks)
        copies = {tokens.device: tokens}

        def seen_by(table: Table) -> Tensor:
            home = table.weight.device if "weight" in table._buffers else tokens.device
            if home == tokens.device:
                return tokens
            if home not in copies:
                copies[home] = tokens.to(home)
            rows: Tensor = table(copies[home])
            return rows.to(tokens.device)

        each = ([block.get_submodule(name) for name in self.tables] for block in self.blocks)
        return [tuple(seen_by(cast(Table, table)) for table in own) for own in each]

    def settle(self) -> None:
        """Settle each Table that is frozen by now."""
        for module in self.modules():
            if isinstance(module, Table) and not module.weight.requires_grad:
                module.settle()

    def tune_states(self, start: State | None = None, parts: Sequence[str] = ("wkv",)) -> None:
        """Make some STATE_PARTS of every layer's state before the first token trainable; they start at the State of one
        sequence, or at zeros. Raises UserError if that State has another part that is not zero."""
        weight = self.emb.weight
        for block, layer in zip(self.blocks, start or State.zeros(self.config, 1, weight.device)):
            rows_are_keys = cast(Recurrent, block.att).rows_are_keys
            for end, tensor in zip(layer.keys(), layer):
                if belongs(f".{end}", parts):
                    values = turned(end, tensor[0], rows_are_keys).to(weight, copy=True).contiguous()
                    module, _, name = end.rpartition(".")
                    setattr(block.get_submodule(module), name, nn.Parameter(values))
                elif start is not None and tensor.any():
                    raise UserError(
                        f"the states to start from have {end}, which --state_parts {' '.join(parts)} leaves out; give "
                        f"--state_parts {' '.join(STATE_PARTS)}, or other states"
                    )

    def tuned_states(self) -> State | None:
        """The tuned time states as the State of one sequence, without gradients; None if there are none."""
        weight, layers, count = self.emb.weight, [], 0
        for layer, block in zip(State.zeros(self.config, 1, weight.device, weight.dtype), self.blocks):
            found, rows_are_keys = {}, cast(Recurrent, block.att).rows_are_keys
            for field, end, zeros in zip(layer._fields, layer.keys(), layer):
                module, _, name = end.rpartition(".")
                tuned = getattr(block.get_submodule(module), name, None)
                if tuned is not None:
                    wide = torch.promote_types(tuned.dtype, zeros.dtype)
                    found[field] = turned(end, tuned.detach(), rows_are_keys)[None].to(wide)
            layers.append(layer._replace(**found))
            count += len(found)
        return State(layers) if count else None


def others_begun(state: Any, sequences: int) -> Any:
    """Extend the fields of a layer's state that cannot be tuned, given for the first few sequences, to all `sequences`
    with zeros, because the others had no token before. Its mixes extend the fields of LayerState."""
    missing = sequences - state.wkv.shape[0]
    if missing <= 0:
        return state
    return state._make(
        tensor if name in LayerState._fields else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
        for name, tensor in zip(state._fields, state)
    )


@torch.no_grad()
def init_around_blocks(model: LanguageModel) -> None:
    """Start the embedding tiny, so that after ln0 only its direction matters; the head orthogonal; and every norm as
    the identity. Draws from torch's global generator."""
    config = model.config
    nn.init.uniform_(model.emb.weight, -1e-4, 1e-4)
    nn.init.orthogonal_(model.head.weight, gain=0.5 * math.sqrt(max(config.vocab_size / config.n_embd, 1)))
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
