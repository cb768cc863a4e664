"""Record on a tape of kernels what each generation's model computes for one token, in the order of its model.py.

Shapes are (n, …) for n sequences of one token each.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..ops.decode import Tape
from ..ops.wkv6.cpu import RECURRENCE as WKV6
from ..ops.wkv7.cpu import RECURRENCE as WKV7


class LayerArguments(NamedTuple):
    """The arguments that take a layer's state: att_shift and ffn_shift have it as their `last`, wkv its `state`, and
    leaves the next one in its `final_state`."""

    att_shift: tuple[Any, ...]
    wkv: Any
    ffn_shift: Any


class Recorder:
    """A tape of a model whose stream x (n, C) is a buffer, and where its layers leave their shifts (2, n, C).

    turned(weight) is a matrix's transpose, contiguous. `pending` is what the next norm adds to the stream.
    """

    def __init__(self, tape: Tape, x: Tensor, turned: Callable[[Tensor], Tensor]) -> None:
        self.tape, self.x, self.turned = tape, x, turned
        self.pending: Tensor | None = None

    def norm(self, norm: nn.LayerNorm, y: Tensor) -> Tensor:
        self.tape.norm(self.x, norm, y, self.pending)
        self.pending = None
        return y

    def factors(self, x: Tensor, first: Tensor, second: Tensor, kind: str, name: str) -> Tensor:
        """f(x first) second, f being one of the tape's kinds."""
        low = self.tape.product(x, self.turned(first), "low")
        return self.tape.product(self.tape.element(kind, low) if kind else low, self.turned(second), name)


def record_rwkv6(recorder: Recorder, block: Any, shifts: Tensor) -> LayerArguments:
    tape, att, ffn = recorder.tape, block.att, block.ffn
    if block.first:
        recorder.norm(block.ln0, recorder.x)
    x = recorder.norm(block.ln1, shifts[0])
    (point,), first = tape.lerp(x, att.time_maa_x.flatten(0, 1), ["point"])
    low = tape.element("tanh", tape.product(point, recorder.turned(att.time_maa_w1), "low"))
    (xw, xk, xv, xr, xg), second = tape.lerp(x, att.maa(), ["xw", "xk", "xv", "xr", "xg"], low, att.time_maa_w2)
    k, v = tape.product(xk, att.key.weight, "k"), tape.product(xv, att.value.weight, "v")
    r, g = tape.product(xr, att.receptance.weight, "r"), tape.product(xg, att.gate.weight, "g")
    w = recorder.factors(xw, att.time_decay_w1, att.time_decay_w2, "tanh", "w")
    tape.element("", w, att.time_decay.flatten())
    y, wkv = tape.recur(WKV6, (r, k, v, w, att.time_faaaa.float()), att.head_size)
    norm, out = att.ln_x, tape.buffer("gated", y.shape[1])
    tensors = dict(y=y, g=g, weight=norm.weight, bias=norm.bias, out=out)
    tape.mix("norm_gate", tensors, eps=norm.eps, channels=y.shape[1], size=att.head_size)
    recorder.pending = tape.product(out, att.output.weight, "mixed")
    x = recorder.norm(block.ln2, shifts[1])
    (xk, xr), third = tape.lerp(x, ffn.maa(), ["xk", "xr"])
    key = tape.product(xk, ffn.key.weight, "key")
    tape.mix("relu_square", dict(x=key, out=key), channels=key.shape[1])
    y, r = tape.product(key, ffn.value.weight, "value"), tape.product(xr, ffn.receptance.weight, "r")
    recorder.pending = tape.buffer("mixed", x.shape[1])
    tape.mix("sigmoid_gate", dict(r=r, v=y, out=recorder.pending), channels=x.shape[1])
    return LayerArguments((first, second), wkv, third)


def record_rwkv7(recorder: Recorder, block: Any, shifts: Tensor) -> LayerArguments:
    tape, att, ffn = recorder.tape, block.att, block.ffn
    if block.first:
        recorder.norm(block.ln0, recorder.x)
    x = recorder.norm(block.ln1, shifts[0])
    sizes = dict(channels=x.shape[1], size=att.head_size)
    (xr, xw, xk, xv, xa, xg), first = tape.lerp(x, att.amounts(), ["xr", "xw", "xk", "xv", "xa", "xg"])
    r, k = tape.product(xr, att.receptance.weight, "r"), tape.product(xk, att.key.weight, "k")
    v = v_first = tape.product(xv, att.value.weight, "v_first" if block.first else "v")
    w = tape.element("", recorder.factors(xw, att.w1, att.w2, "tanh", "w"), att.w0.flatten())
    if not block.first:
        low, v_first = recorder.factors(xv, att.v1, att.v2, "", "low"), tape.buffer("v_first", x.shape[1])
        v = tape.buffer("value_mixed", x.shape[1])
        tensors = dict(v=tape.buffer("v", x.shape[1]), first=v_first, low=low, v0=att.v0, out=v)
        tape.mix("value_residual", tensors, channels=x.shape[1])
    g = recorder.factors(xg, att.g1, att.g2, "sigmoid", "g")
    rate = recorder.factors(xa, att.a1, att.a2, "", "a")
    key, removed, written = (tape.buffer(name, x.shape[1]) for name in ("keys", "removed", "written"))
    tensors = dict(k=k, low=rate, a0=att.a0, k_k=att.k_k, k_a=att.k_a, key=key, a=removed, b=written)
    tape.mix("delta_keys", tensors, **sizes)
    y, wkv = tape.recur(WKV7, (r, w, key, v, removed, written), att.head_size)
    norm, out = att.ln_x, tape.buffer("gated", x.shape[1])
    tensors = dict(y=y, r=r, k=key, v=v, g=g, r_k=att.r_k, weight=norm.weight, bias=norm.bias, out=out)
    tape.mix("norm_bonus_gate", tensors, eps=norm.eps, **sizes)
    recorder.pending = tape.product(out, att.output.weight, "mixed")
    x = recorder.norm(block.ln2, shifts[1])
    (xk,), second = tape.lerp(x, ffn.x_k.flatten(0, 1), ["xk"])
    key = tape.product(xk, ffn.key.weight, "key")
    tape.mix("relu_square", dict(x=key, out=key), channels=key.shape[1])
    recorder.pending = tape.product(key, ffn.value.weight, "mixed")
    return LayerArguments((first,), wkv, second)


RECORDS: MappingProxyType[str, Callable[[Recorder, Any, Tensor], LayerArguments]] = MappingProxyType(
    {"x060": record_rwkv6, "x070": record_rwkv7}
)
