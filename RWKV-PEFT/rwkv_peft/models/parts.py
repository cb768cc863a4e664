"""Parts of a model that every generation has: what stands around its blocks, and how that starts."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..config import ModelConfig
from ..ops import adding
from ..ops.mix import Asked, norm_lerp, relu_square
from .state import TIME_STATE, LayerState, State, swapped

HeadFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, weight of the head) -> what stands for logits
Adds = Callable[[], bool]  # whether what reads a layer's result adds what the layer leaves


class AddedLinear(nn.Linear):
    """A linear layer whose result is added to a residual: on a GPU inside its product."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """x (..., in), residual (..., out) -> their sum, (..., out)."""
        return adding.linear(x, self.weight, residual)


class Input(NamedTuple):
    """A linear layer's input x (B, T, in), or what its bones made of that, and the shift (T, rank) that came of it, or
    the sums over shards that it asked for."""

    x: torch.Tensor
    shift: torch.Tensor | None = None

    def through(self, layer: nn.Module, *residual: torch.Tensor) -> torch.Tensor:
        """-> (B, T, out), added to a residual where there is one."""
        return layer(self.x, *residual) if self.shift is None else layer(self.x, *residual, shift=self.shift)


def bones_of(layers: Sequence[nn.Module | None], x: torch.Tensor, kept: int | None = None) -> list[Asked]:
    """What each linear layer asks of the norm that makes its input, like x: matrices by which that may bend it, but for
    the one of number `kept`, which has other users; the rank of its sums over shards; or None."""
    asks = [getattr(layer, "bones", None) for layer in layers]
    return [None if bones is None else bones(x, i == kept) for i, bones in enumerate(asks)]


def inputs_of(points: Sequence[torch.Tensor], bones: Sequence[Asked], shifts: Sequence[torch.Tensor]) -> list[Input]:
    """A norm's points (B, T, C), of those with bones, where it gives any, its shifts."""
    left = iter(shifts)
    given = [bool(shifts) and bone is not None for bone in bones]
    return [Input(point, next(left) if one else None) for point, one in zip(points, given, strict=True)]


class AroundSquare(Protocol):
    """A linear layer before or after a squared relu that may leave a part of low rank to its kernel, as low_square has
    it: what is added to the square's input, or what is made of the square."""

    def around_square(self, x: torch.Tensor, channels: int) -> bool:
        """Whether it does, where the square has so many channels and its input is like x."""

    def opened(
        self, x: torch.Tensor, shift: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Before: x (B, T, in) -> the square's input (B, T, out), and left and up, whose product is to be added."""

    def squared(
        self, x: torch.Tensor, left: torch.Tensor, up: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """After: what `opened` gives -> what `closed` is given: the square, or what it will square, and a term."""

    def closed(self, x: torch.Tensor, right: torch.Tensor | None, *residual: torch.Tensor) -> torch.Tensor:
        """After: (B, T, in) and that term, or None -> (B, T, out)."""


class BeforeNorm(Protocol):
    """A linear layer that may leave what it adds to each shard of its outputs to a norm that reads them, as norm_lerp
    has it."""

    def before_norm(self, x: torch.Tensor) -> bool:
        """Whether it does, where its input is like x."""

    def unshifted(
        self,
        x: torch.Tensor,
        *residual: torch.Tensor,
        right: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, T, in), right as AroundSquare's `closed` has it, shift as Input -> (B, T, out), and what is left
        (n, B T, r)."""


def unshifted(
    layer: nn.Module, given: Input, *residual: torch.Tensor, adds: Adds | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An Input through a layer, added to a residual, and None; or what it gives where it `leaves` something."""
    if leaves(layer, given.x, adds):
        return cast(BeforeNorm, layer).unshifted(given.x, *residual, shift=given.shift)
    return given.through(layer, *residual), None


def leaves(layer: nn.Module, x: torch.Tensor, adds: Adds | None) -> bool:
    """Whether a layer is a BeforeNorm that leaves something of its result, its input being like x, as the norm that
    reads it `adds` that: asked last, since that names parameters, which ZeRO-3 would gather."""
    before = cast(BeforeNorm, layer)
    return adds is not None and hasattr(layer, "before_norm") and before.before_norm(x) and adds()


def adds_left(norm: nn.LayerNorm, *points: torch.Tensor) -> bool:
    """Whether a norm with its points adds in its pass what layers before it leave: where all are frozen."""
    return not any([parameter.requires_grad for parameter in (norm.weight, norm.bias, *points)])


def feed_forward(
    key: nn.Module, value: nn.Module, given: Input, *residual: torch.Tensor, adds: Adds | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """value(max(key(x), 0)², *residual), for linear layers, AroundSquare and BeforeNorm or not, and key's Input ->
    (B, T, C), and None, or what value left, as `unshifted` has it."""
    channels = cast(nn.Linear, key).out_features
    before, after = cast(tuple[AroundSquare, AroundSquare], (key, value))
    if not all([hasattr(one, "around_square") and one.around_square(given.x, channels) for one in (before, after)]):
        return unshifted(value, Input(relu_square(given.through(key))), *residual, adds=adds)
    square, right = after.squared(*before.opened(*given))  # the square's input is in memory no longer than that
    if leaves(value, square, adds):
        return cast(BeforeNorm, value).unshifted(square, *residual, right=right)
    return after.closed(square, right, *residual), None


class MixedNorm(nn.LayerNorm):
    """Normalizes, and moves each token towards the one before."""

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        maa: torch.Tensor,
        shift: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None = None,
        bones: Sequence[Asked] = (),
        twice: int | None = None,
        left: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """x (B, T, C), maa (m, C), shift (B, C) or None, what precedes the norm's first token, of each point the bones
        of its layer, or None, and what a layer left of x, or None -> x with that, for the residual, the norm's last
        token (B, C), m points between its tokens and those before (B, T, C), last of all point number `twice` again,
        the shifts that come of bones."""
        norm = self.weight, self.bias, self.eps
        return norm_lerp(x, *norm, shift, maa, cu_seqlens, twice=twice, left=left, bones=bones)


class Recurrent(nn.Module):
    """A time mix whose wkv state before the first token may be tuned: time_state (H, N value, N key), as files have it;
    None stands for zeros. rows_are_keys tells the axes of the state that it computes with (Family.rows_are_keys).
    """

    rows_are_keys: bool
    time_state: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter(TIME_STATE, None)

    def begun(self, carried: torch.Tensor | None, sequences: int) -> torch.Tensor | None:
        """The wkv states (sequences, H, N, N) to begin with, None for zeros: carried (m, H, N, N), those of the first m
        sequences, or None; the others begin from time_state."""
        missing = sequences - (0 if carried is None else carried.shape[0])
        if missing == 0 or (carried is None and self.time_state is None):
            return carried
        if self.time_state is None:
            assert carried is not None
            return torch.cat([carried, carried.new_zeros(missing, *carried.shape[1:])])
        start = swapped(self.time_state) if self.rows_are_keys else self.time_state
        # summed over the sequences in float32 on the way back, also for a bfloat16 model
        fresh = start.to(torch.promote_types(start.dtype, torch.float32)).expand(missing, -1, -1, -1)
        return fresh if carried is None else torch.cat([carried, fresh])


def count_sequences(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:
    """How many sequences x (B, T, …) holds: B, or as many as cu_seqlens (n + 1,) packs."""
    return x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1


class Head(nn.Linear):
    """The output projection, which can hand its weight to a function instead of forming the logits.

    A loss that walks the vocabulary in chunks needs the weight itself; reaching it through the module's forward
    keeps ZeRO-3's gathering hooks in the path.
    """

    def forward(self, x: torch.Tensor, function: HeadFunction | None = None) -> torch.Tensor:
        """x (B, T, C) -> logits (B, T, V), or function(x, weight)."""
        return super().forward(x) if function is None else function(x, self.weight)


class LanguageModel(nn.Module):
    """Embedding, blocks, norm and head, under RWKV-LM's parameter names. A generation says what its blocks are:
    make_block(config, layer), called as block(x, *carried, state, cu_seqlens, whole) -> (x, *carried, LayerState);
    carried is what the first of them is given of what blocks hand on besides x. A block whose x is to be the `whole`
    leaves nothing for the next one's norm to add.

    grad_checkpoint recomputes each block in the backward pass instead of keeping its activations; x is the whole then,
    so that it is all that is kept. Parameters are empty until `init_weights` or `load_state_dict` fills them.
    """

    make_block: Callable[[Any, int], nn.Module]
    carried: tuple[None, ...]

    def __init__(self, config: ModelConfig, grad_checkpoint: bool = False) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpoint = grad_checkpoint
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(self.make_block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Head(config.n_embd, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: torch.Tensor,
        state: State | None = None,
        cu_seqlens: torch.Tensor | None = None,
        head: HeadFunction | None = None,
        keep: bool = True,
    ) -> tuple[torch.Tensor, State]:
        """tokens (B, T) int64, state State or None -> logits (B, T, V), State, which is empty unless it is to `keep`.

        cu_seqlens (n + 1,) marks the boundaries of n sequences packed in one row (B = 1); nothing crosses them. The
        state is of n sequences, or of the first of them, and the others begin where tuned time states or zeros let
        them. `head(x, weight)`, where given, takes the place of the logits (see Head).
        """
        x, after = self.through_blocks(self.emb(tokens), state, cu_seqlens, keep)
        return self.head(self.ln_out(x), head), after

    def through_blocks(
        self, x: torch.Tensor, state: State | None = None, cu_seqlens: torch.Tensor | None = None, keep: bool = True
    ) -> tuple[torch.Tensor, State]:
        """The part of forward between embedding and norm: x (B, T, C) -> x (B, T, C), State. Of many packed sequences
        the states are large, all layers' at once more so."""
        carried: Sequence[torch.Tensor | None] = self.carried
        sequences = count_sequences(x, cu_seqlens)
        states = []
        for layer, block in enumerate(self.blocks):
            before = None if state is None else shifts_begun(state[layer], sequences)
            inputs = (x, *carried, before, cu_seqlens)
            if self.grad_checkpoint and torch.is_grad_enabled():
                x, *carried, layer_state = checkpoint(block, *inputs, True, use_reentrant=False)
            else:
                x, *carried, layer_state = block(*inputs, layer == len(self.blocks) - 1)
            if keep:
                states.append(layer_state)
            del layer_state
        return x, State(states)

    def tune_states(self, start: State | None = None) -> None:
        """Give every layer a time_state that trains, from the State of one sequence, or from zeros."""
        weight = self.emb.weight
        for layer, block in enumerate(self.blocks):
            att = block.att
            assert isinstance(att, Recurrent)
            if start is None:
                shape = (self.config.n_head, self.config.head_size, self.config.head_size)
                values = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            else:
                wkv = start[layer].wkv[0]
                values = (swapped(wkv) if att.rows_are_keys else wkv).to(weight, copy=True).contiguous()
            att.time_state = nn.Parameter(values)

    def tuned_states(self) -> State | None:
        """The State of one sequence that the tuned time states make, without gradients; None where there are none."""
        layers = []
        for zeros, block in zip(
            State.zeros(self.config, 1, self.emb.weight.device, self.emb.weight.dtype), self.blocks
        ):
            att = block.att
            assert isinstance(att, Recurrent)
            wkv = att.begun(None, 1)
            if wkv is None:
                return None
            layers.append(zeros._replace(wkv=wkv.detach()))
        return State(layers)


def shifts_begun(state: LayerState, sequences: int) -> LayerState:
    """A LayerState of the first of some sequences with shifts for all of them: the others had no token before."""
    missing = sequences - state.att_shift.shape[0]
    if missing <= 0:
        return state
    att_shift, ffn_shift = (F.pad(shift, (0, 0, 0, missing)) for shift in (state.att_shift, state.ffn_shift))
    return LayerState(att_shift, state.wkv, ffn_shift)


@torch.no_grad()
def init_around_blocks(model: LanguageModel) -> None:
    """Start the embedding tiny, so that ln0 makes its direction, not its size, what matters; the head orthogonal; and
    every norm as the identity. Draws from torch's global generator."""
    config = model.config
    nn.init.uniform_(model.emb.weight, -1e-4, 1e-4)
    nn.init.orthogonal_(model.head.weight, gain=0.5 * math.sqrt(max(config.vocab_size / config.n_embd, 1)))
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
