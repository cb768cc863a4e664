"""Checks the kernels that training takes in seconds: a small model's loss and gradients against float64.

    python benchmarks/gpu_smoke.py [--generations x070 x060] [--methods bat-in bone lora] [--rows plain packed]

Runs the demo's models, which have heads of 64 and the factors' ranks of the 1.6B, in bfloat16 on rows long and few
enough that time is split. The truth is the same model in float64 and plain torch on the same device. Each gradient, and
their mean, may be three times as far from it as the worst of plain torch's in bfloat16, because plain torch has the
recurrence in float32. Memory is poisoned before, and repetitions have the same bits. One JSON object for each case,
with the kernels that it launched; the last lists the kernels of all families that no case launched. Exit code 1 if one
is wrong.
"""

import functools
import itertools
import statistics
import sys
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import gpu_budget
import torch
from common import Parser
from gpu_check_steps import DEMO
from gpu_models import tell
from gpu_probe import FAMILIES

from rwkv_peft.checkpoints.base import open_base
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.ops.native.cuda import CudaFamily
from rwkv_peft.ops.recurrence import Recurrence
from rwkv_peft.training.step.steps import Whole

TEXT = (
    "The wind is strong. Rob has 4 blue maps.\nQ: What things?\nA: maps\nQ: How many?\nA: 4\nA dog sleeps. So what?\n"
)
FACTOR, LEAST, MEAN_LEAST = 3, 3e-2, 1e-2  # of plain torch's errors, and errors that bfloat16 may have in any case


def batch_of(rows, args):
    """A batch that the models have learned, because on random tokens their gradients are mostly rounding errors."""
    count, device = args.tokens, args.device
    row = torch.tensor(BytesTokenizer().encode(TEXT * (count // len(TEXT) + 1)), device=device)[None, : count + 1]
    batch = {"tokens": row[:, :-1], "targets": row[:, 1:], "counted": torch.arange(count, device=device)}
    if rows == "packed":
        batch["cu_seqlens"] = (torch.arange(5) * count // 4).to(device)
    return batch


def made(family, weights, config, method, rank):
    """A model with an adapter that is not zero."""
    torch.manual_seed(0)
    model = family.load(weights, config)
    gpu_budget.adapt(model, method, rank, family)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=1e-3)
    return model


@contextmanager
def plain_torch():
    """A context in which kernels take no tensor."""
    with ExitStack() as stack:
        for owner, name, value in (
            (CudaFamily, "takes", lambda *_: False),
            (Recurrence, "_resolve", lambda self, *_: "reference"),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


@contextmanager
def recorded(launched):
    """A context in which the names of launched kernels are put into a set."""
    run = CudaFamily.run

    def recording(self, name, *rest, **others):
        launched.add(name)
        return run(self, name, *rest, **others)

    with patch.object(CudaFamily, "run", recording):
        yield


def copy_of(family, config, weights, method, model, rank):
    """The same model in the weights' dtype."""
    twin = family.load(weights, config)
    gpu_budget.adapt(twin, method, rank, family)
    twin.to(next(iter(weights.values())).dtype).load_state_dict(model.state_dict())
    return twin


def found(model, batch):
    """{"loss": loss, name of a trained tensor: its gradient} in float64."""
    model.zero_grad(set_to_none=True)
    loss = Whole().loss(model, batch, batch["targets"].numel())
    loss.backward()
    trained = {name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach().double(), **trained}


def errors(values, truth):
    """{name: error relative by norm}; a gradient far below the others in norm is the rest after others cancelled, so
    that its error is compared with at least a tenth of their mean."""
    norms = {name: true.norm() for name, true in truth.items()}
    least = 0.1 * torch.stack(list(norms.values())[1:]).mean()
    scales = {name: norm if name == "loss" else torch.maximum(norm, least) for name, norm in norms.items()}
    return {name: float((values[name] - true).norm() / scales[name]) for name, true in truth.items()}


def poison(device):
    """Leave NaN in the memory that the allocator gives out next."""
    blocks = [torch.full((2**size,), float("nan"), device=device) for size in range(8, 24)]
    del blocks


def check(args, version, method, rows, launched):
    """Print one case, with the errors of wrong gradients, ours and plain torch's -> True if it is right."""
    base = open_base(DEMO[version])
    family, config = base.family, base.config
    weights = {name: x.to(args.device, torch.bfloat16) for name, x in base.tensors.items()}
    model = made(family, weights, config, method, args.rank)
    batch = batch_of(rows, args)
    exact = {name: x.double() for name, x in weights.items()}
    with plain_torch():
        truth = found(copy_of(family, config, exact, method, model, args.rank), batch)
        plain = found(copy_of(family, config, weights, method, model, args.rank), batch)
    here = set()
    with recorded(here):
        poison(args.device)
        ours = found(model, batch)
        again = [found(model, batch) for _ in range(args.repeats)]
    repeated = all(torch.equal(ours[name], one[name]) for one in again for name in ours)
    mine, theirs = errors(ours, truth), errors(plain, truth)
    wrong = [name for name in truth if not mine[name] <= FACTOR * max(theirs.values()) + LEAST]  # which NaN is not
    close = statistics.mean(mine.values()) <= FACTOR * statistics.mean(theirs.values()) + MEAN_LEAST
    launched |= here
    tell(
        generation=version,
        method=method,
        rows=rows,
        right=close and not wrong,
        repeated=repeated,
        wrong={name: [mine[name], theirs[name]] for name in wrong[:5]},
        largest_errors=[max(mine.values()), max(theirs.values())],
        mean_errors=[statistics.mean(mine.values()), statistics.mean(theirs.values())],
        kernels=sorted(here),
    )
    return repeated and bool(here) and close and not wrong


QUICK = dict(device="cpu", generations=("x070",), methods=("bat-in",), rows=("plain",), tokens=8, rank=8, repeats=1)


def main(argv=None):
    parser = Parser(__doc__, **QUICK)
    parser.add_argument("--generations", nargs="+", default=("x070", "x060"))
    parser.add_argument("--methods", nargs="+", default=("bat-in", "bone", "lora"), choices=gpu_budget.METHODS[1:])
    parser.add_argument("--rows", nargs="+", default=("plain", "packed"), choices=("plain", "packed"))
    parser.add_argument("--tokens", type=int, default=640)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(argv)
    launched, wrong = set(), []
    for case in itertools.product(args.generations, args.methods, args.rows):
        try:
            if not check(args, *case, launched):
                wrong.append(" ".join(case))
        except RuntimeError as failure:  # a launch that failed says so; after some no kernel runs in this process
            tell(case=" ".join(case), failed=str(failure).splitlines()[0])
            wrong.append(" ".join(case))
    names = functools.reduce(set.union, (set(family.names) for family in FAMILIES))
    tell(wrong=wrong, kernels_launched=len(launched), kernels_not_launched=sorted(names - launched))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
