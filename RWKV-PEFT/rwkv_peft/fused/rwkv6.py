"""RWKV-6's block in fewer passes: norm and token shift share a pass, the normalized input and the decay's point are
never in memory, and the feed-forward may be one chain."""

from torch import Tensor

from ..models.rwkv6.model import Block
from ..models.state import LayerState
from ..ops.mix import sigmoid_gate
from ..ops.mix.cuda import LOW_CHANNELS, LOW_RANKS, MOST_MIXED
from .feed_forward import FeedForward
from .norm_ddlerp import norm_ddlerp
from .norm_lerp import norm_lerp

FROZEN = ("ln1", "ln2", "att.time_maa", "att.time_decay_w1", "ffn.time_maa")  # prefixes of parameters' names


def misfit(block: Block) -> str:
    """The reason why the kernels do not take a block of these sizes; "" if they do."""
    C, ranks = len(block.ln1.weight), (block.att.time_maa_w2.shape[1], block.att.time_decay_w1.shape[1])
    if C > MOST_MIXED or C % LOW_CHANNELS:
        return f"{C} channels: at most {MOST_MIXED}, a multiple of {LOW_CHANNELS}"
    if ranks not in [(rank, 2 * rank) for rank in LOW_RANKS]:
        return f"ranks {ranks[0]} and {ranks[1]} of token shift and decay, and no released model has them"
    return ""


def forward(
    feed_forward: FeedForward,
    block: Block,
    x: Tensor,
    state: LayerState | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, LayerState]:
    """The fused forward of a block; arguments and results are Block.forward's."""
    att, ffn = block.att, block.ffn
    att_shift, wkv, ffn_shift = state if state is not None else (None, None, None)
    if block.first:
        x = block.ln0(x)
    factors = att.time_maa_x[0], att.time_maa_w1, att.maa(), att.time_maa_w2, att.time_decay_w1
    x, att_shift, low, (xk, xv, xr, xg) = norm_ddlerp(block.ln1, x, att_shift, factors, cu_seqlens)
    k, v, r, g = att.key(xk), att.value(xv), att.receptance(xr), att.gate(xg)
    y, wkv = att.recur(r, k, v, att.decay(low), wkv, cu_seqlens)
    x = x + att.output(att.ln_x(y, g))
    x, ffn_shift, (xk, xr) = norm_lerp(block.ln2, x, ffn_shift, ffn.maa(), cu_seqlens)
    y = feed_forward(ffn.key, ffn.value, xk)
    return x + sigmoid_gate(ffn.receptance(xr), y), LayerState(att_shift, wkv, ffn_shift)
