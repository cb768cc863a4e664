"""Checks that every ZeRO strategy trains like one process, resumes bitwise and writes the same file; and its memory.

    python benchmarks/zero.py matrix                (100 runs of train.py of six steps, and each resumed from the third)
    python benchmarks/zero.py memory --folder out/zero                       (full training of 73 M parameters, 2 ranks)

The matrix: the five strategies x 1 and 2 ranks x float32 and bfloat16 x accumulation 1 and 2 x grad_cp 0 and 1, for
bat-in; for full training accumulation 2 with grad_cp 1, on a model whose embedding and head are above the size from
which ZeRO-3 shards a parameter. Every step is of the same four samples. Each run is compared with that of one process
under stage 1, with one micro batch and without recomputing, in the same precision: the largest relative difference of a
loss and of a gradient norm, and of the file's tensors by norm. A line has the worst of all accumulations and grad_cp.
Two ranks are two nodes of one device. The exit code is 1 if float32 differs by more than LOSS or NORM, or if a run does
not resume bitwise (only those of DeepSpeed's Adam for CPUs, offload, need not).
"""

import argparse
import itertools
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from fault_processes import started
from fault_training import import_libraries, train
from safetensors.torch import load_file

from rwkv_peft.config import STRATEGIES
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.files.base import save_model
from rwkv_peft.files.pth import read_tensors
from rwkv_peft.models import family_named
from rwkv_peft.plan.command import estimate_of
from rwkv_peft.plan.flags import parse_flags
from rwkv_peft.plan.parts import CPU, peak
from rwkv_peft.plots import read_metrics
from rwkv_peft.training.flags.request import request_of

SAMPLES, STEPS, HALF = 4, 6, 3
LOSS, NORM = 1e-4, 1e-3  # how far a float32 run may be from the single process
PRECISIONS = ("fp32", "bf16")
METHODS = {
    "bat-in": ("--bone_r", "16", "--lr_init", "1e-3", "--lr_final", "1e-3"),
    "full": ("--peft", "none", "--lr_init", "1e-4", "--lr_final", "1e-4"),
}
SHAPES = {"matrix": (2, 64, 20_000), "memory": (6, 768, 16_384)}  # layers, channels, vocabulary
NUMBERS = ("step", "loss", "lr", "grad_norm")


class Cell(NamedTuple):
    """One way to train."""

    method: str
    strategy: str = STRATEGIES[0]
    ranks: int = 1
    precision: str = "fp32"
    accumulate: int = 1
    grad_cp: int = 0

    @property
    def flags(self):
        micro = SAMPLES // (self.ranks * self.accumulate)
        numbers = {"micro_bsz": micro, "accumulate_grad_batches": self.accumulate, "grad_cp": self.grad_cp}
        words = {"strategy": self.strategy, "precision": self.precision, "num_nodes": self.ranks}
        return [*METHODS[self.method], *(f"--{name}={value}" for name, value in {**numbers, **words}.items())]

    @property
    def name(self):
        return "-".join(map(str, self))


class Difference(NamedTuple):
    """The largest relative differences of losses, gradient norms and tensors between two runs, and True if the run
    resumes with the same bits."""

    loss: float
    norm: float
    file: float
    resumes: bool


class Runs:
    """Runs of train.py in folders of `folder`, all on one base and data."""

    def __init__(self, folder, shape, ctx_len):
        self.folder, self.ctx_len = folder, ctx_len
        folder.mkdir(parents=True, exist_ok=True)
        layers, channels, vocabulary = SHAPES[shape]
        torch.manual_seed(0)
        family = family_named("x060")
        model = family.build(family.new_dimensions(layers, channels, vocabulary))
        family.init_weights(model)
        save_model(folder / "base.pth", model.state_dict())
        with ShardWriter(folder / "data", vocab_size=vocabulary) as writer:
            for first in range(40):
                writer.add([1 + (first + 7 * i) % 79 for i in range(ctx_len + 30 + first)] + [0])

    def flags(self, name, cell):
        inputs = {"load_model": "base.pth", "data_file": "data", "proj_dir": name}
        paths = [f"--{flag}={self.folder / path}" for flag, path in inputs.items()]
        return [*paths, f"--ctx_len={self.ctx_len}", "--accelerator=cpu", *cell.flags]

    def run(self, name, cell, *more):
        """Train -> the largest resident size of a rank, in bytes."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        argv, logs = [*self.flags(name, cell), *more], [self.folder / f"{name}.{node}" for node in range(cell.ranks)]
        processes = [
            started(train, argv, log, {**meeting, "NODE_RANK": str(node)} if cell.ranks > 1 else {})
            for node, log in enumerate(logs)
        ]
        ends = [os.wait4(process, 0)[1:] for process in processes]
        if any(status for status, _ in ends):
            raise SystemExit(f"{name} failed:\n" + "\n".join(log.read_text() for log in logs))
        return max(usage.ru_maxrss for _, usage in ends) * 1024

    def outcome(self, name):
        """(NUMBERS of each step, the tensors of the newest file) of a run."""
        folder = self.folder / name
        lines = [[line[key] for key in NUMBERS] for line in read_metrics(folder / "metrics.jsonl")]
        model, adapter = folder / "rwkv.pth", folder / "adapter.safetensors"
        return lines, read_tensors(model) if model.exists() else load_file(adapter)

    def resume(self, name, cell):
        """The outcome of a run that is resumed from the middle of another."""
        again = f"{name}-resumed"
        shutil.copytree(self.folder / name, self.folder / again)
        shutil.rmtree(self.folder / again / "checkpoints" / f"step-{STEPS:08d}")
        self.run(again, cell, *MATRIX, "--resume")
        return self.outcome(again)


MATRIX = ("--lr_schedule=constant", f"--epoch_steps={STEPS}", f"--save_every={HALF}", "--keep_checkpoints=0")


def matrix(folder, args):
    """Print the matrix's table; -> what did not hold."""
    runs, references, faults = Runs(folder, "matrix", 24), {}, []
    print(f"| method | strategy | ranks | {' | '.join(f'{p}: loss | norm | file | resumes' for p in PRECISIONS)} |")
    print("|---|---|---|" + "---|" * 4 * len(PRECISIONS), flush=True)
    for method, strategy, ranks in itertools.product(args.methods, args.strategies, (1, 2)):
        columns = [method, strategy.removeprefix("deepspeed_"), ranks]
        for precision in PRECISIONS:
            single = Cell(method, precision=precision)
            if single not in references:
                runs.run(f"single-{single.name}", single, *MATRIX)
                references[single] = runs.outcome(f"single-{single.name}")
            kinds = itertools.product((1, 2), (0, 1)) if method == "bat-in" else [(2, 1)]
            cells = [Cell(method, strategy, ranks, precision, *kind) for kind in kinds]
            found = [compare(runs, cell, references[single]) for cell in cells]
            faults += [f"{cell.name}: {one}" for cell, one in zip(cells, found) if is_fault(cell, one)]
            columns.append(shown(found))
        print(f"| {' | '.join(map(str, columns))} |", flush=True)
    for method in args.methods:
        low, high = (references[Cell(method, precision=precision)] for precision in ("bf16", "fp32"))
        loss, norm, file, _ = difference(low, high, low)
        print(f"bf16 against fp32, one process, {method}: loss {loss:.0e}, norm {norm:.0e}, file {file:.0e}")
    return faults


def compare(runs, cell, reference):
    """Run a cell, and again from its middle -> the Difference from the reference."""
    runs.run(cell.name, cell, *MATRIX)
    found = difference(runs.outcome(cell.name), reference, runs.resume(cell.name, cell))
    for left in runs.folder.glob(f"{cell.name}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    print(f"{cell.name}: {found}", file=sys.stderr, flush=True)
    return found


def is_fault(cell, found):
    """True if a float32 run is too far from the single process, or a run that should does not resume bitwise."""
    return (
        cell.precision == "fp32"
        and (found.loss > LOSS or found.norm > NORM)
        or not (found.resumes or cell.strategy.endswith("offload"))
    )


def difference(outcome, reference, resumed):
    """The Difference of an outcome from the reference's, with a comparison of the resumed one."""
    (lines, tensors), (true_lines, true_tensors) = outcome, reference
    assert len(lines) == len(true_lines) == STEPS and tensors.keys() == true_tensors.keys()
    loss, norm = (
        max(abs(mine[place] - true[place]) / abs(true[place]) for mine, true in zip(lines, true_lines))
        for place in (NUMBERS.index("loss"), NUMBERS.index("grad_norm"))
    )
    apart = sum((tensors[key].double() - true.double()).square().sum() for key, true in true_tensors.items())
    size = sum(true.double().square().sum() for true in true_tensors.values())
    bits = resumed[0] == lines and all(torch.equal(resumed[1][key], tensor) for key, tensor in tensors.items())
    return Difference(loss, norm, float((apart / size).sqrt()), bits)


def shown(found):
    """The worst of some Differences, as a table's cells."""
    numbers = [max(values) for values in list(zip(*found))[:3]]
    resumed = sum(one.resumes for one in found)
    said = "bitwise" if resumed == len(found) else f"{resumed} of {len(found)} bitwise" if resumed else "not bitwise"
    return " | ".join([*("same" if number == 0 else f"{number:.0e}" for number in numbers), said])


def memory(folder):
    """Print the largest resident size of a rank by strategy, beside the plan's."""
    runs = Runs(folder, "memory", 64)
    print("| strategy | ranks | measured, MiB | planned, MiB |\n|---|---|---|---|", flush=True)
    for strategy, ranks in [(STRATEGIES[0], 1), *((strategy, 2) for strategy in STRATEGIES)]:
        cell = Cell("full", strategy, ranks, "bf16")
        taken = runs.run("run", cell, "--epoch_steps=3", "--epoch_save=0")
        estimate = estimate_of(request_of(parse_flags(runs.flags("run", cell))), CPU)
        data = estimate.config.data
        planned = peak(estimate.parts(data.micro_bsz, data.ctx_len), CPU) + estimate.file_pages()
        shutil.rmtree(folder / "run")
        columns = (strategy.removeprefix("deepspeed_"), ranks, taken >> 20, planned >> 20)
        print(f"| {' | '.join(map(str, columns))} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("matrix", "memory"))
    parser.add_argument("--folder", type=Path, help="where the temporary folder of models and runs is made")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS), help="of the matrix")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES, help="of the matrix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    import_libraries()
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        if args.what == "memory":
            return memory(Path(place) / "runs")
        faults = matrix(Path(place) / "runs", args)
    print(*faults, sep="\n", end="\n" * bool(faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
