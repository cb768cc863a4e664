"""The time that a block takes on the processor that drives a GPU, measured without a GPU: Python, torch, launches.

    python benchmarks/gpu_host.py [--generations x060 x070] [--methods frozen bat-in …] [--rounds 200]

A block runs forward and backward over one token of 128 channels on a GPU's code path, on which our kernels' launches
are prepared and then dropped: next to nothing is computed, and the time is that of the processor before a GPU can begin
(the least of all rounds, so that other work on the machine counts little). "host" includes some 3 us that a driver
takes for each launch. "GPU" is a block's time on an H100 by benchmarks/gpu_budget.py, at the size and tokens of each
column. A block takes the greater of the two.
"""

import sys
import time
from contextlib import ExitStack
from unittest.mock import patch

import gpu_budget as budget
import torch
from common import Parser

from rwkv_peft.models import family_named
from rwkv_peft.ops import bone as bone_op
from rwkv_peft.ops import mix
from rwkv_peft.ops.bone import cuda as bone
from rwkv_peft.ops.mix import cpu, cuda, functions
from rwkv_peft.ops.wkv6 import WKV6
from rwkv_peft.ops.wkv7 import WKV7

CHANNELS = 128  # of which next to nothing is computed, and whose feed-forwards have whole tiles
DRIVER = 3e-6  # seconds of a launch that no Python sees
TOKENS = (256, 1024, 4096)


class Dropped:
    """Kernels whose launches are dropped."""

    def run(self, *arguments):
        return 0


def gpu_path():
    """A context in which a CPU's tensors take a GPU's code path."""
    stack = ExitStack()
    for owner, name, value in (
        (mix, "has_kernel", lambda *_: True),
        (functions, "CpuLerp", functions.GpuLerp),
        (cpu, "call", cuda.call),
        (cuda.FAMILY, "kernels", lambda _: Dropped()),
        (bone.FAMILY, "kernels", lambda _: Dropped()),
        (bone_op, "backend", lambda *_, **__: bone),
    ):
        stack.enter_context(patch.object(owner, name, value))
    for recurrence in (WKV6, WKV7):
        stack.enter_context(patch.object(recurrence, "choose", lambda *_: "cuda"))
        stack.enter_context(patch.object(recurrence.cuda.family, "kernels", lambda _: Dropped()))
    return stack


def host_seconds(family, method, rounds):
    """The least processor time of a block's forward and backward: block 1 of two."""
    torch.manual_seed(0)
    model = family.build(family.new_dimensions(2, CHANNELS, 256)).to(torch.bfloat16)
    budget.adapt(model, method, 16, family)
    block, trained = model.blocks[1], [p for p in model.blocks[1].parameters() if p.requires_grad]
    times = []
    with gpu_path():
        inputs = budget.handed_on(model, torch.zeros(1, 1, CHANNELS, dtype=torch.bfloat16))
        grads = [torch.zeros_like(x) for x in inputs]  # as what it hands on is
        for _ in range(rounds):
            start = time.process_time()
            torch.autograd.backward(block(*inputs)[:-1], grads)
            times.append(time.process_time() - start)
            for tensor in (*inputs, *trained):
                tensor.grad = None
    return min(times)


def gpu_seconds(family, method, size, tokens):
    """A block's seconds on an H100 that waits for nothing: its floor, and the bytes outside it."""
    channels = budget.SHAPES[size][0]
    found = budget.figures(family, channels, 2 * channels, method)
    return found["seconds"] * tokens / (2 * channels)


def main(argv=None):
    parser = Parser(__doc__, generations=("x070",), methods=("frozen",), rounds=1)
    parser.add_argument("--generations", nargs="+", default=("x060", "x070"))
    parser.add_argument("--methods", nargs="+", default=("frozen", "bat-in", "lora"), choices=budget.METHODS)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    columns = [(size, tokens) for size in budget.SHAPES for tokens in TOKENS]
    print("| generation | method | launches | host, us | " + " | ".join(f"GPU, {s}, {t}" for s, t in columns) + " |")
    print("|---|---|---|---|" + "---|" * len(columns))
    for version in args.generations:
        family = family_named(version)
        for method in args.methods:
            launches = len(budget.count(family, 2048, 4096, method)[0])
            host = host_seconds(family, method, args.rounds) + DRIVER * launches
            cells = " | ".join(f"{1e6 * gpu_seconds(family, method, *column):.0f}" for column in columns)
            print(f"| {family.name} | {method} | {launches} | {1e6 * host:.0f} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
