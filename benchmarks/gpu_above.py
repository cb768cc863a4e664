"""Kernels on tensors of more than 2^31 elements, at which an index of 32 bits wraps: the last row must be right.

    python benchmarks/gpu_above.py

One JSON object an operation, forward and backward, in bfloat16; the rows do not depend on each other, so that the last
of many has the bits of a batch that is this row alone, unless the kernels split time for few rows: then it is close.
"""

import sys
from functools import partial

import torch
from common import Parser
from gpu_models import VOCABULARY, peak_gib, reset_peak, tell, without_room
from gpu_probe import RECURRENCES, inputs

from rwkv_peft.ops import mix
from rwkv_peft.ops.cross_entropy import cross_entropy_

N = 64
CLOSE = 2e-2  # bfloat16, and a sum in another order


def results(function, leaves, gradient):
    """(the result, the gradient of the first leaf) of a function."""
    leaves = [x.detach().requires_grad_(i == 0) for i, x in enumerate(leaves)]
    y = function(*leaves)
    y.backward(gradient)
    return y.detach(), leaves[0].grad


def last(x):
    return x[-1:].clone()


def rows_of(function, leaves, gradient, shared=0):
    """(results of the last row among the others, results of that row alone); all rows share the last `shared`
    leaves."""
    among = [last(x) for x in results(function, leaves, gradient)]
    own = [*(last(x) for x in leaves[: len(leaves) - shared]), *leaves[len(leaves) - shared :]]
    return among, results(function, own, last(gradient))


def recurrence(op, rows, args):
    """One of RECURRENCES; r, k, v and the gradient share memory, because a card has room for only some twelve."""
    leaves, _ = inputs(op, 1, args.tokens, args.heads, N, torch.bfloat16, args.device)
    many = {name: x.detach().expand(rows, -1, -1, -1) for name, x in zip(op.rows, leaves)}
    shared = many["v"].contiguous()
    tensors = [shared if name in "rkv" else x.contiguous() for name, x in many.items()]
    rest = [x.detach() for x in leaves[len(tensors) :]]
    return rows_of(lambda *x: op.call(*x)[0], [*tensors, *rest], shared, len(rest))


def elementwise(function, count, rows, args):
    """An operation on tensors (rows, T, C)."""
    shape = 1, args.tokens, args.heads * N
    row = [torch.randn(shape, device=args.device, dtype=torch.bfloat16) for _ in range(count + 1)]
    *leaves, gradient = (x.expand(rows, -1, -1).contiguous() for x in row)
    return rows_of(function, leaves, gradient)


def loss(rows, args):
    """The losses and their gradient, of a vocabulary of 65,536."""
    count = max(2, rows * args.tokens * args.heads * N // VOCABULARY)
    logits = torch.randn(1, VOCABULARY, device=args.device, dtype=torch.bfloat16).expand(count, -1).contiguous()
    targets = torch.zeros(count, dtype=torch.int64, device=args.device)
    alone = cross_entropy_(last(logits), targets[:1], 1.0, each=True)
    among = cross_entropy_(logits, targets, 1.0, each=True)
    return [x[-1:] for x in among], alone


OPERATIONS = {
    **{op.name: partial(recurrence, op) for op in RECURRENCES},
    "relu_square": partial(elementwise, mix.relu_square, 1),
    "sigmoid_gate": partial(elementwise, mix.sigmoid_gate, 2),
    "loss": loss,
}


def check(name, args):
    """Print the result of one operation -> 1 if it is wrong."""
    reset_peak(args.device)
    row = args.tokens * args.heads * N
    rows = args.elements // row + 1
    among, alone = OPERATIONS[name](rows, args)
    errors = [float((x.double() - y.double()).norm() / y.double().norm()) for x, y in zip(among, alone)]
    right = all(error <= CLOSE for error in errors)  # which NaN is not
    tell(operation=name, elements=rows * row, right=right, errors=errors, **peak_gib(args.device))
    return int(not right)


def main(argv=None):
    parser = Parser(__doc__, device="cpu", elements=4000, tokens=20, heads=2)
    parser.add_argument("--only", nargs="+", default=tuple(OPERATIONS), choices=tuple(OPERATIONS))
    parser.add_argument("--elements", type=int, default=2**31, help="a tensor has more than so many")
    parser.add_argument("--tokens", type=int, default=4096, help="of a row")
    parser.add_argument("--heads", type=int, default=64, help="of 64 channels")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(argv)
    return max(without_room(lambda name=name: check(name, args), operation=name) for name in args.only)


if __name__ == "__main__":
    sys.exit(main())
