"""The speed on the CPU of the models' operations between matrix products: our single pass against plain torch.

    python benchmarks/mix.py [--dtype float32|bfloat16] [--shape T,H] [--rounds 8]

Head size 64, one row of T tokens. Each round runs every operation both ways, one after the other, on one thread and in
that thread's own time; times are the least of the rounds, ratios the medians of those within a round. Parameters are
frozen, as in training an adapter.
"""

import statistics
import sys
import time
from unittest.mock import patch

import torch
from common import Parser, head, row

from rwkv_peft.memory import keep_freed_memory
from rwkv_peft.ops import mix
from rwkv_peft.ops.mix import cpu

HEAD_SIZE = 64
CALLS = 4  # of one operation in a round
EPS = 64e-5


def operations(T, H, dtype):
    """{name: (function, differentiated inputs, parameters)}."""
    C = H * HEAD_SIZE
    torch.manual_seed(0)

    def tensors(count, *shape):
        return [torch.randn(shape).to(dtype).requires_grad_() for _ in range(count)]

    def parameters(count, *shape):
        return [torch.randn(shape).to(dtype) for _ in range(count)]

    rows, heads = (1, T, C), (1, T, H, HEAD_SIZE)
    return {
        "lerp, six at once": (lambda x, maa: mix.lerp(x, None, maa), tensors(1, *rows), parameters(1, 6, C)),
        "relu_square, 4 C wide": (mix.relu_square, tensors(1, 1, T, 4 * C), []),
        "delta_keys": (mix.delta_keys, tensors(2, *heads), parameters(3, 1, 1, C)),
        "value_residual": (mix.value_residual, tensors(3, *rows), parameters(1, 1, 1, C)),
        "norm_bonus_gate": (
            lambda *x: mix.norm_bonus_gate(*x[:5], x[5:], EPS),
            tensors(4, *heads) + tensors(1, *rows),
            parameters(1, H, HEAD_SIZE) + parameters(2, C),
        ),
        "norm_gate (RWKV-6)": (
            lambda *x: mix.norm_gate(*x, EPS),
            tensors(1, *heads) + tensors(1, *rows),
            parameters(2, C),
        ),
    }


def milliseconds(function, inputs, parameters):
    """Milliseconds of (forward, forward and backward) of a call."""
    outs = results(function, inputs, parameters)
    grads = [torch.ones_like(out) for out in outs]
    start = time.thread_time()
    for _ in range(CALLS):
        results(function, inputs, parameters)
    between = time.thread_time()
    for _ in range(CALLS):
        torch.autograd.grad(results(function, inputs, parameters), inputs, grads)
    return 1e3 * (between - start) / CALLS, 1e3 * (time.thread_time() - between) / CALLS


def results(function, inputs, parameters):
    outs = function(*inputs, *parameters)
    return outs if isinstance(outs, tuple) else (outs,)


def main(argv=None):
    parser = Parser(__doc__, shape="32,2", rounds=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shape", default="512,12", help="T,H")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()  # as train.py does
    T, H = map(int, options.shape.split(","))
    print(f"torch {torch.__version__}, T = {T}, H = {H}, {options.dtype}\n")
    head("", "forward, ms", "torch", "ratio", "forward + backward, ms", "torch", "ratio")
    for name, operation in operations(T, H, getattr(torch, options.dtype)).items():
        rounds = []
        for _ in range(options.rounds + 1):  # the first warms up
            ours = milliseconds(*operation)
            with patch.object(cpu.FAMILY, "unavailable", lambda: "not wanted"):
                rounds.append((ours, milliseconds(*operation)))
        cells = []
        for direction in (0, 1):
            pairs = [(ours[direction], plain[direction]) for ours, plain in rounds[1:]]
            cells += [f"{min(column):.2f}" for column in zip(*pairs)]
            cells.append(f"{statistics.median(plain / ours for ours, plain in pairs):.1f}")
        row(name, *cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
