"""What stands between a GPU's matrix products, checked on it: mix's, bone's and the loss's kernels against float64.

    python benchmarks/gpu_ops.py [--device cpu]

One JSON object an operation and dtype: the errors of results and gradients, ours and plain torch's, relative to
float64 on the device, and whether repetitions are equal. Exit code 1 where an error is more than twice plain torch's.
gpu_probe.py smoke runs it.
"""

import argparse
import json
import sys
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch

from rwkv_peft.adapters.bat_in import bat_in
from rwkv_peft.adapters.bat_out import bat_out
from rwkv_peft.adapters.bone import bone
from rwkv_peft.adapters.lora import lora
from rwkv_peft.ops import adding, mix
from rwkv_peft.ops import bone as bone_ops
from rwkv_peft.ops import cross_entropy as loss_ops
from rwkv_peft.ops.wkv6 import wkv6_gated
from rwkv_peft.ops.wkv7 import wkv7_gated

T, C, H, N = 300, 512, 8, 64
REPEATS = 20
ROWS, HEADS, SUM = (2, T, C), (2, T, H, N), (2, T, 256)
VECTOR, HEADS_VECTOR = (1, 1, C), (H, N)
LOW = ((2, T, 5 * 32), (5, 32, C))
DDLERP = {rank: ((1, C), (C, 5 * rank), (5, C), (5, rank, C), (C, 2 * rank)) for rank in (32, 64)}
DECAY = VECTOR, (C,), (C,)  # its parameter, and the norm's two
BOUNDS = (0, 1, 64, 128, 300)


def packed_lerp(x, last, maa, low, up):
    """A row of several sequences, as `cu_seqlens` has them."""
    return mix.lerp(x[:1], last, maa, low[:1], up, torch.tensor(BOUNDS, device=x.device))


def norm_lerp(x, last, weight, bias, maa):
    """Its results side by side."""
    again, ends, points, _ = mix.norm_lerp(x, weight, bias, 1e-5, last, maa, whole=True, twice=1)
    return again, ends, *points


def norm_ddlerp(x, y, gate, last, weight, bias, *factors):
    """Its results side by side, of a row of several sequences."""
    bounds = torch.tensor(BOUNDS, device=x.device)
    total, ends, low, points, _ = mix.norm_ddlerp(x[:1], y[:1], gate[:1], weight, bias, 1e-5, last, *factors, bounds)
    return total, ends, low, *points


def bent_norm_lerp(x, last, weight, bias, maa, *bones):
    """norm_lerp whose points bat-in's layers take, or what those make of them; small, as gradients are cosines."""
    again, ends, points, shifts = mix.norm_lerp(x, weight, bias, 1e-5, last, maa, bones=bones)
    return again, ends, *beside(points, shifts, bones)


def bent_norm_ddlerp(x, y, gate, last, weight, bias, *factors):
    """The same of norm_ddlerp, and a row of several sequences."""
    bounds, (*factors, first, second) = torch.tensor(BOUNDS, device=x.device), factors
    bones = first, None, second, None
    row = x[:1], y[:1], gate[:1], weight, bias, 1e-5, last, *factors, bounds
    total, ends, low, points, shifts = mix.norm_ddlerp(*row, bones=bones)
    return total, ends, low, *beside(points, shifts, bones)


def beside(points, shifts, bones):
    """Points and shifts, as `bent` gives them, whether kernels bent them or not."""
    points, shifts = (points, shifts) if shifts else mix.bent(points, bones)
    return *points, *(shift / 8 for shift in shifts)


def summed_lerp(x, left, last, weight, bias, maa):
    """norm_lerp of what an adapter left something of, one of whose points has a second user, with sums of points."""
    norm = x, weight, bias, 1e-5, last, maa
    again, ends, points, totals = mix.norm_lerp(*norm, twice=1, left=left, bones=(64, 64))
    return again, ends, *points, *summed(points, (64, 64), totals)


def summed_ddlerp(x, y, gate, last, weight, bias, *factors):
    """norm_ddlerp with sums of points, and a row of several sequences."""
    row, ranks = (x[:1], y[:1], gate[:1], weight, bias, 1e-5, last, *factors), (32, None, 32, 32)
    total, ends, low, points, totals = mix.norm_ddlerp(*row, torch.tensor(BOUNDS, device=x.device), bones=ranks)
    return total, ends, low, *points, *summed(points, ranks, totals)


def summed(points, ranks, totals):
    """Sums over shards, made by kernels or here; small, as gradients are cosines."""
    made = [x.flatten(0, 1).unflatten(1, (-1, rank)).sum(1) for x, rank in zip(points, ranks) if rank is not None]
    return [total / 8 for total in totals or made]


def left_lerp(x, left, last, *parameters):
    """norm_lerp of what an adapter left something of."""
    total, ends, points, _ = mix.norm_lerp(x, *parameters[:2], 1e-5, last, parameters[2], left=left)
    return total, ends, *points


def left_ddlerp(x, y, gate, left_y, left_gate, last, weight, bias, *factors):
    """norm_ddlerp of a gated residual whose parts adapters left something of."""
    lefts = dict(left_y=left_y, left_gate=left_gate)
    total, ends, low, points, _ = mix.norm_ddlerp(x, y, gate, weight, bias, 1e-5, last, *factors, **lefts)
    return total, ends, low, *points


def gated_wkv6(r, k, v, low, g, u, up, parameter, *norm):
    """wkv6 with decay, norm and gate, of usual decays."""
    return wkv6_gated((r, k, v), (low, up, parameter - 3), u, g, *norm, 64e-5)


def gated_wkv7(r, w, k, v, low, again, g, a0, k_k, k_a, *parameters):
    """wkv7 with keys, norm, bonus and gate; k_k and k_a about 1, as models have them."""
    return wkv7_gated((r, w, k, v, low), (a0, 1 + k_k, 1 + k_a), again, g, *parameters, 64e-5)


def low_square(x, left, up, down):
    """relu² between two adapters as LoRA's are; its results are of both."""
    return mix.low_square(x, left, up.t(), down.t(), 64)


def shard_square(x, left):
    """The same between a tile and a sum over shards."""
    return mix.low_square(x, left, None, None, 64)


def squared_bat_in(x, weight, bone, left):
    """bat-in after the relu² of what another left open; small, as the gradient is its cosine."""
    return bat_in(x, weight, bone, left=left) / 8


def with_residual(method):
    """A method whose product adds a residual, which comes last."""
    return lambda *inputs: method(*inputs[:-1], residual=inputs[-1])


def loss(logits):
    """The loss and its gradient, as if that were a result."""
    targets = torch.arange(logits.shape[0], device=logits.device)
    return loss_ops.cross_entropy_(logits.detach().clone(), targets, 0.5, 0.01)


# name -> (function, shapes of its inputs, which of them have gradients: all, where None)
OPS = {
    "lerp": (lambda x, maa: mix.lerp(x, None, maa), (ROWS, (6, C)), None),
    "lerp of low rank": (lambda *inputs: mix.lerp(inputs[0], None, *inputs[1:]), (ROWS, (5, C), *LOW), (0, 2)),
    "lerp of low rank, packed": (packed_lerp, (ROWS, (len(BOUNDS) - 1, C), (5, C), *LOW), (0, 1, 3)),
    "lerp of low rank, trained": (packed_lerp, (ROWS, (len(BOUNDS) - 1, C), (5, C), *LOW), None),
    "norm_gate": (lambda *inputs: mix.norm_gate(*inputs, 64e-5), (HEADS, ROWS, (C,), (C,)), None),
    "norm_bonus_gate": (
        lambda *inputs: mix.norm_bonus_gate(*inputs, 64e-5),
        (HEADS, HEADS, HEADS, HEADS, ROWS, HEADS_VECTOR, (C,), (C,)),
        None,
    ),
    "wkv6_gated": (gated_wkv6, (*3 * [HEADS], (2, T, 64), ROWS, HEADS_VECTOR, (64, C), *DECAY), range(6)),
    "wkv6_gated, rank 128": (gated_wkv6, (*3 * [HEADS], (2, T, 128), ROWS, HEADS_VECTOR, (128, C), *DECAY), range(6)),
    "wkv6_gated, rank 32": (gated_wkv6, (*3 * [HEADS], (2, T, 32), ROWS, HEADS_VECTOR, (32, C), *DECAY), range(6)),
    "wkv7_gated": (gated_wkv7, (*6 * [HEADS], ROWS, *3 * [VECTOR], HEADS_VECTOR, (C,), (C,)), range(7)),
    "delta_keys": (mix.delta_keys, (HEADS, HEADS, VECTOR, VECTOR, VECTOR), None),
    "value_residual": (mix.value_residual, (ROWS, ROWS, ROWS, VECTOR), None),
    "relu_square": (mix.relu_square, (ROWS,), None),
    "low_square": (low_square, (ROWS, (2 * T, 64), (C, 64), (64, C)), None),
    "low_square, repeated": (shard_square, (ROWS, (2 * T, 64)), None),
    "sigmoid_gate": (mix.sigmoid_gate, (ROWS, ROWS), None),
    "layer_norm": (lambda *inputs: mix.layer_norm(*inputs, 1e-5), (ROWS, (C,), (C,)), None),
    "norm_lerp": (norm_lerp, (ROWS, (2, C), (C,), (C,), (2, C)), (0, 1)),
    "norm_ddlerp": (norm_ddlerp, (*3 * [ROWS], (len(BOUNDS) - 1, C), (C,), (C,), *DDLERP[32]), range(4)),
    "norm_ddlerp, rank 64": (norm_ddlerp, (*3 * [ROWS], (len(BOUNDS) - 1, C), (C,), (C,), *DDLERP[64]), range(4)),
    "norm_ddlerp, trained": (norm_ddlerp, (*3 * [ROWS], (len(BOUNDS) - 1, C), (C,), (C,), *DDLERP[32]), None),
    "norm_lerp, bent": (bent_norm_lerp, (ROWS, (2, C), (C,), (C,), (2, C), *2 * [(C // 64, 64, 64)]), (0, 1, 5, 6)),
    "norm_ddlerp, bent": (
        bent_norm_ddlerp,
        (*3 * [ROWS], (len(BOUNDS) - 1, C), (C,), (C,), *DDLERP[32], *2 * [(C // 32, 32, 32)]),
        (0, 1, 2, 3, 11, 12),
    ),
    "norm_lerp, summed": (summed_lerp, (ROWS, (4, 2 * T, 64), (2, C), (C,), (C,), (2, C)), range(3)),
    "norm_ddlerp, summed": (summed_ddlerp, (*3 * [ROWS], (len(BOUNDS) - 1, C), (C,), (C,), *DDLERP[32]), range(4)),
    "norm_lerp, left": (left_lerp, (ROWS, (4, 2 * T, 64), (2, C), (C,), (C,), (2, C)), range(3)),
    "norm_ddlerp, left": (
        left_ddlerp,
        (*3 * [ROWS], *2 * [(4, 2 * T, 128)], (2, C), (C,), (C,), *DDLERP[32]),
        range(6),
    ),
    "gated_residual": (mix.gated_residual, (ROWS, ROWS, ROWS), None),
    "bat-in": (bat_in, (ROWS, (256, C), (C // 64, 64, 64)), (0, 2)),
    "bat-in, rank 128": (bat_in, (ROWS, (256, C), (C // 128, 128, 128)), (0, 2)),
    "bat-in, rank 8": (bat_in, (ROWS, (256, C), (C // 8, 8, 8)), (0, 2)),
    "bat-in-scaled": (partial(bat_in, scale=5.0), (ROWS, (256, C), (C // 64, 64, 64)), (0, 2)),
    "bat-in, relu²": (squared_bat_in, (ROWS, (256, C), (C // 64, 64, 64), (2 * T, 64)), (0, 2, 3)),
    "bat-in, relu², rank 128": (squared_bat_in, (ROWS, (256, C), (C // 128, 128, 128), (2 * T, 128)), (0, 2, 3)),
    "bat-out": (bat_out, (ROWS, (256, C), (4, 64, 64)), (0, 2)),
    "bone": (bone, (ROWS, (256, C), (64, 256)), (0, 2)),
    "residual": (adding.linear, (ROWS, (256, C), SUM), None),
    "residual, bat-in": (with_residual(bat_in), (ROWS, (256, C), (C // 64, 64, 64), SUM), (0, 2, 3)),
    "residual, bone": (with_residual(bone), (ROWS, (256, C), (64, 256), SUM), (0, 2, 3)),
    "residual, lora": (with_residual(lora), (ROWS, (256, C), (64, C), (256, 64), SUM), (0, 2, 3, 4)),
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
            stack.enter_context(patch.object(mix.op, "fused", lambda *_: False))
            stack.enter_context(patch.object(adding, "inside_product", lambda *_: False))
            stack.enter_context(patch.object(bone_ops.op, "backend", lambda *_, **__: None))
            stack.enter_context(patch.object(loss_ops.op, "backend", lambda *_: None))
        outs = function(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        if wanted:
            torch.autograd.backward(outs, [torch.cos(3 * out.detach()) for out in outs])
    return [x.detach().double().cpu() for x in (*outs, *(leaves[i].grad for i in wanted))]


def check(device):
    """{operation, dtype, right, repeated, errors} of each operation."""
    for name, (_, shapes, _) in OPS.items():
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [x.to(dtype) for x in inputs_of(shapes, device)]
            truth = results(name, inputs, torch.float64, device, kernels=False)
            plain = results(name, inputs, dtype, device, kernels=False)
            ours = results(name, inputs, dtype, device)
            repeated = all(
                all(map(torch.equal, ours, results(name, inputs, dtype, device))) for _ in range(REPEATS - 1)
            )
            errors = [[float((x - true).norm() / true.norm()) for x in both] for *both, true in zip(ours, plain, truth)]
            least = 1e-5 if dtype == torch.float32 else 4e-3
            right = all(mine <= 2 * theirs + least for mine, theirs in errors)  # NaN is not
            kind = str(dtype).removeprefix("torch.")
            yield dict(kernels=name, dtype=kind, right=right, repeated=repeated, errors_ours_and_torch=errors)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    wrong = 0
    for entry in check(parser.parse_args(argv).device):
        print(json.dumps(entry), flush=True)
        wrong += not (entry["right"] and entry["repeated"])
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
