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
from rwkv_peft.adapters.product import Frozen
from rwkv_peft.ops import bone as bone_ops
from rwkv_peft.ops import cross_entropy as loss_ops
from rwkv_peft.ops import decode, mix

T, C, H, N = 300, 512, 8, 64
REPEATS = 20
ROWS, HEADS = (2, T, C), (2, T, H, N)
VECTOR, HEADS_VECTOR = (1, 1, C), (H, N)
LOW = ((2, T, 5 * 32), (5, 32, C))
BOUNDS = (0, 1, 64, 128, 300)


def packed_lerp(x, last, maa, low, up):
    """lerp over a row of several sequences, with the bounds `cu_seqlens`."""
    return mix.lerp(x[:1], last, maa, low[:1], up, torch.tensor(BOUNDS, device=x.device))


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
    function, _, wanted = OPS[name]
    wanted = range(len(inputs)) if wanted is None else wanted
    leaves = [x.to(device=device, dtype=dtype, copy=True).requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    with ExitStack() as stack:
        if not kernels:
            stack.enter_context(patch.object(mix, "has_kernel", lambda *_: False))
            stack.enter_context(patch.object(bone_ops, "backend", lambda *_, **__: None))
            stack.enter_context(patch.object(loss_ops, "backend", lambda *_: None))
            for family in (decode.CPU, decode.CUDA):
                stack.enter_context(patch.object(family, "takes", lambda *_: False))
        outs = function(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        if wanted:
            torch.autograd.backward(outs, [torch.cos(3 * out.detach()) for out in outs])
    return [x.detach().double().cpu() for x in (*outs, *(leaves[i].grad for i in wanted))]


def check(device, repeats=REPEATS, only=()):
    """{operation, dtype, right, repeated, errors} of each operation, run so often."""
    for name, (_, shapes, _) in OPS.items():
        if only and name not in only:
            continue
        for dtype in (torch.float32, torch.bfloat16):
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
