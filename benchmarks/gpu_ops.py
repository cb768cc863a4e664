"""Checks the kernels between matrix products on a GPU: mix's, bone's, the loss's and decoding's against float64.

    python benchmarks/gpu_ops.py [--device cpu] [--repeats 20]

One JSON object for each operation and dtype: the errors of results and gradients, ours and plain torch's, relative to
float64 on the device, and true if repetitions are equal. Exit code 1 if an error is more than twice plain torch's.
gpu_probe.py smoke runs it.
"""

import json
import sys
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch
from common import Parser

from rwkv_peft.adapters.functions.bat_in import bat_in
from rwkv_peft.adapters.functions.bat_out import bat_out
from rwkv_peft.adapters.functions.bone import bone
from rwkv_peft.adapters.functions.lora import lora
from rwkv_peft.adapters.product import DENSE, Frozen
from rwkv_peft.fused.feed_forward import KeyUpToTile, ValueOfSquare
from rwkv_peft.fused.norm_ddlerp import NormDDLerp
from rwkv_peft.fused.norm_lerp import NormLerp
from rwkv_peft.fused.wkv7_keys import WKV7WithKeys
from rwkv_peft.ops import bone as bone_ops
from rwkv_peft.ops import cross_entropy as loss_ops
from rwkv_peft.ops import decode, mix
from rwkv_peft.ops.wkv7 import wkv7

T, C, H, N = 300, 512, 8, 64
REPEATS = 20
ROWS, HEADS = (2, T, C), (2, T, H, N)
VECTOR, HEADS_VECTOR = (1, 1, C), (H, N)
LOW = ((2, T, 5 * 32), (5, 32, C))
DDLERP = {rank: ((1, C), (C, 5 * rank), (5, C), (5, rank, C), (C, 2 * rank)) for rank in (32, 64)}
BOUNDS = (0, 1, 64, 128, 300)


def packed_lerp(x, last, maa, low, up):
    """lerp over a row of several sequences, with the bounds `cu_seqlens`."""
    return mix.lerp(x[:1], last, maa, low[:1], up, torch.tensor(BOUNDS, device=x.device))


def normalized(x, last, weight, bias):
    """x, its layer norm, and the norm's last token in each of the sequences of BOUNDS."""
    normal = torch.nn.functional.layer_norm(x, (C,), weight, bias)
    return x, normal, mix.last_token(normal, bounds(x))


def bounds(x):
    return torch.tensor(BOUNDS, device=x.device)


def norm_lerp(x, last, weight, bias, maa, fused):
    """Norm and points, of a row of several sequences."""
    if fused:
        return NormLerp.apply(x[:1], last, weight, bias, maa, 1e-5, bounds(x))
    x, normal, ends = normalized(x[:1], last, weight, bias)
    return x, ends, *mix.lerp(normal, last, maa, None, None, bounds(x))


def norm_ddlerp(x, last, *parameters, fused):
    """Norm and RWKV-6's points, of a row of several sequences."""
    if fused:
        return NormDDLerp.apply(1e-5, bounds(x), last, x[:1], *parameters)
    weight, bias, maa_x, w1, maa, w2, decay_w1 = parameters
    x, normal, ends = normalized(x[:1], last, weight, bias)
    (point,) = mix.lerp(normal, last, maa_x, None, None, bounds(x))
    first, *points = mix.lerp(normal, last, maa, torch.tanh(point @ w1), w2, bounds(x))
    return x, ends, torch.tanh(first @ decay_w1), *points


def wkv7_with_keys(*tensors, fused):
    """wkv7 with keys, norm, bonus and gate; k_k and k_a about 1, as models have them."""
    r, w, k, v, low, g, a0, k_k, k_a, r_k, weight, bias = tensors
    keys = a0, 1 + k_k, 1 + k_a
    if fused:
        return WKV7WithKeys.apply(True, 64e-5, None, None, r, w, k, v, low, g, *keys, r_k, weight, bias)
    k, a, b = mix.delta_keys(k, low, *keys)
    y, state = wkv7(r, w, k, v, a, b)
    return mix.norm_bonus_gate(y, r, k, v, g, (r_k, weight, bias), 64e-5), state


def chain(x, key, value, opened, closing, fused):
    """bat-in around the squared relu; small, because the gradient is its cosine."""
    x = x.flatten(0, 1)
    if fused:
        k, tile = KeyUpToTile.apply(x, key, None, DENSE, opened, 1.0)
        return ValueOfSquare.apply(k, tile, value, None, DENSE, closing, 1.0) / 8
    return bat_in(mix.relu_square(bat_in(x, Frozen(key), opened)), Frozen(value), closing) / 8


# Of bfloat16 alone: fused, or by the operations that they fuse.
FUSED = {
    "norm_lerp": (norm_lerp, (ROWS, (len(BOUNDS) - 1, C), (C,), (C,), (2, C)), (0, 1)),
    "norm_ddlerp": (norm_ddlerp, (ROWS, (len(BOUNDS) - 1, C), (C,), (C,), *DDLERP[32]), (0, 1)),
    "norm_ddlerp, rank 64": (norm_ddlerp, (ROWS, (len(BOUNDS) - 1, C), (C,), (C,), *DDLERP[64]), (0, 1)),
    "wkv7 with keys": (wkv7_with_keys, (*5 * [HEADS], ROWS, *3 * [VECTOR], HEADS_VECTOR, (C,), (C,)), range(6)),
    "chain": (chain, (ROWS, (256, C), (C, 256), (C // 64, 64, 64), (4, 64, 64)), (0, 3, 4)),
}


def loss(logits):
    """The loss and its gradient, both as results."""
    targets = torch.arange(logits.shape[0], device=logits.device)
    return loss_ops.cross_entropy_(logits.detach().clone(), targets, 0.5, 0.01)


def blocks(x, weight, bits):
    """Products of a few rows and of many with blocks."""
    matrix = decode.quantize(weight.detach(), bits)
    return tuple(decode.product(x.detach().flatten(0, 1)[:rows], matrix) for rows in (1, 5, 16, 600))


def on_frozen(function, *rest):
    """An adapter's function of x, a weight and its parameters."""
    return lambda x, weight, *params: function(x, Frozen(weight), *params, *rest)


# name -> (function, shapes of its inputs, which of them have gradients: all, where None)
OPS = {
    "lerp": (lambda x, maa: mix.lerp(x, None, maa), (ROWS, (6, C)), None),
    "lerp of low rank": (lambda *inputs: mix.lerp(inputs[0], None, *inputs[1:]), (ROWS, (5, C), *LOW), (0, 2)),
    "lerp of low rank, packed": (packed_lerp, (ROWS, (len(BOUNDS) - 1, C), (5, C), *LOW), (0, 1, 3)),
    "lerp of low rank, trained": (packed_lerp, (ROWS, (len(BOUNDS) - 1, C), (5, C), *LOW), None),
    "norm_gate": (lambda *inputs: mix.norm_gate(*inputs, 64e-5), (HEADS, ROWS, (C,), (C,)), None),
    "norm_bonus_gate": (
        lambda *inputs: mix.norm_bonus_gate(*inputs[:5], inputs[5:], 64e-5),
        (HEADS, HEADS, HEADS, HEADS, ROWS, HEADS_VECTOR, (C,), (C,)),
        None,
    ),
    "delta_keys": (mix.delta_keys, (HEADS, HEADS, VECTOR, VECTOR, VECTOR), None),
    "value_residual": (mix.value_residual, (ROWS, ROWS, ROWS, VECTOR), None),
    "relu_square": (mix.relu_square, (ROWS,), None),
    "sigmoid_gate": (mix.sigmoid_gate, (ROWS, ROWS), None),
    "bat-in": (on_frozen(bat_in), (ROWS, (256, C), (C // 64, 64, 64)), (0, 2)),
    "bat-in, rank 128": (on_frozen(bat_in), (ROWS, (256, C), (C // 128, 128, 128)), (0, 2)),
    "bat-in, rank 8": (on_frozen(bat_in), (ROWS, (256, C), (C // 8, 8, 8)), (0, 2)),
    "bat-in-scaled": (on_frozen(bat_in, 5.0), (ROWS, (256, C), (C // 64, 64, 64)), (0, 2)),
    "bat-out": (on_frozen(bat_out), (ROWS, (256, C), (4, 64, 64)), (0, 2)),
    "bone": (on_frozen(bone), (ROWS, (256, C), (64, 256)), (0, 2)),
    "lora": (on_frozen(lora), (ROWS, (256, C), (64, C), (256, 64)), (0, 2, 3)),
    **{f"blocks of {bits} bits": (partial(blocks, bits=bits), (ROWS, (300, C)), ()) for bits in (8, 4)},
    "loss": (loss, ((300, 65536),), ()),
}


def inputs_of(shapes, device):
    """Random tensors; parameters, which come after the first tensors of (B, T, …), are small."""
    generator = torch.Generator().manual_seed(0)
    scale = [1.0 if shape[:2] in ((2, T), (300, 65536)) else 0.2 for shape in shapes]
    return [(s * torch.randn(shape, generator=generator)).to(device) for s, shape in zip(scale, shapes)]


def results(name, inputs, dtype, device, kernels=True):
    """The outputs of an operation and its gradients, in dtype."""
    function, _, wanted = (OPS | FUSED)[name]
    function = partial(function, fused=kernels) if name in FUSED else function
    wanted = range(len(inputs)) if wanted is None else wanted
    leaves = [x.to(device=device, dtype=dtype, copy=True).requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    with ExitStack() as stack:
        if not kernels:
            stack.enter_context(patch.object(mix.op, "fused", lambda *_: False))
            stack.enter_context(patch.object(bone_ops.op, "backend", lambda *_, **__: None))
            stack.enter_context(patch.object(loss_ops.op, "backend", lambda *_: None))
            for module in (decode.cpu, decode.cuda):
                stack.enter_context(patch.object(module.FAMILY, "takes", lambda *_: False))
        outs = function(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        if wanted:
            torch.autograd.backward(outs, [torch.cos(3 * out.detach()) for out in outs])
    return [x.detach().double().cpu() for x in (*outs, *(leaves[i].grad for i in wanted))]


def check(device, repeats=REPEATS, only=()):
    """{operation, dtype, right, repeated, errors} of each operation, run so often."""
    for name, (_, shapes, _) in (OPS | FUSED).items():
        if only and name not in only:
            continue
        for dtype in (torch.bfloat16,) if name in FUSED else (torch.float32, torch.bfloat16):
            inputs = [x.to(dtype) for x in inputs_of(shapes, device)]
            truth = results(name, inputs, torch.float64, device, kernels=False)
            plain = results(name, inputs, dtype, device, kernels=False)
            ours = results(name, inputs, dtype, device)
            repeated = all(
                all(map(torch.equal, ours, results(name, inputs, dtype, device))) for _ in range(repeats - 1)
            )
            errors = [[float((x - true).norm() / true.norm()) for x in both] for *both, true in zip(ours, plain, truth)]
            least = 1e-5 if dtype == torch.float32 else 4e-3
            right = all(mine <= 2 * theirs + least for mine, theirs in errors)  # NaN is not
            kind = str(dtype).removeprefix("torch.")
            yield dict(kernels=name, dtype=kind, right=right, repeated=repeated, errors_ours_and_torch=errors)


def main(argv=None):
    parser = Parser(__doc__, device="cpu", repeats=1, only=("relu_square", "value_residual"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--only", nargs="+", choices=OPS, default=())
    args, wrong = parser.parse_args(argv), 0
    for entry in check(args.device, args.repeats, args.only):
        print(json.dumps(entry), flush=True)
        wrong += not (entry["right"] and entry["repeated"])
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
