"""RWKV-7's block in fewer passes: norm and token shift share a pass, the recurrence makes its own keys and measures the
bonus, and the feed-forward may be one chain."""

from torch import Tensor

from ..models.parts import count_sequences
from ..models.rwkv7.model import Block
from ..models.state import LayerState
from ..ops.mix.cuda import MOST_MIXED
from ..ops.recurrence.cuda import CHUNKED_SIZE
from .feed_forward import FeedForward
from .norm_lerp import norm_lerp
from .wkv7_keys import wkv7_with_keys

FROZEN = ("ln1", "ln2", "att.ln_x", "att.x_", "att.a0", "att.k_", "att.r_k", "ffn.x_k")  # prefixes of parameters' names


def misfit(block: Block) -> str:
    """The reason why the kernels do not take a block of these sizes; "" if they do."""
    C, size = len(block.ln1.weight), block.att.head_size
    if C > MOST_MIXED:
        return f"{C} channels: at most {MOST_MIXED}"
    return "" if size == CHUNKED_SIZE else f"head size {size}: only {CHUNKED_SIZE}, as in all released models"


def forward(
    feed_forward: FeedForward,
    block: Block,
    x: Tensor,
    v_first: Tensor | None,
    state: LayerState | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, LayerState]:
    """The fused forward of a block; arguments and results are Block.forward's."""
    att, ffn = block.att, block.ffn
    att_shift, wkv, ffn_shift = state if state is not None else (None, None, None)
    if block.first:
        x = block.ln0(x)
    x, att_shift, points = norm_lerp(block.ln1, x, att_shift, att.amounts(), cu_seqlens)
    *rows, g, v_first = att.projected(points, v_first)
    wkv = att.begun(wkv, count_sequences(x, cu_seqlens))
    heads = [tensor.unflatten(-1, (att.n_head, att.head_size)) for tensor in rows]
    y, wkv = wkv7_with_keys(heads, (att.a0, att.k_k, att.k_a), g, att.r_k, att.ln_x, wkv, cu_seqlens)
    x = x + att.output(y)
    x, ffn_shift, (xk,) = norm_lerp(block.ln2, x, ffn_shift, ffn.x_k[0], cu_seqlens)
    return x + feed_forward(ffn.key, ffn.value, xk), v_first, LayerState(att_shift, wkv, ffn_shift)
