"""`rwkv-peft compare`: match sizes, sweep rates, repeat the best with other seeds, report; flags.py has the usage."""

import math
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...adapters.method import Method
from ...adapters.methods import METHODS
from ...checkpoints.atomic import write_text
from ...checkpoints.base import Base
from ...checkpoints.lock import alone_in
from ...cli.errors import Ended, UserError, ending_of
from ...cli.names import STATE
from ...cli.parser import counted
from ...config import AdapterConfig, ModelConfig
from ...models.family import Family
from ...models.state import time_state_shapes
from ...training.flags.request import parse_run
from ...training.rates import automatic_rate
from .flags import FULL, Comparison, method_flags, parse_flags
from .plan import Cell, Size, nearest_to, next_cells, rate_of
from .report import draw_figures, lines_of_json, rows_of, table
from .runs import RESULT, Outcome, check_record, read_outcome, run_cells

Layers = Counter[tuple[int, int]]  # {(out_features, in_features): number of layers}


def main(argv: list[str]) -> int:
    """Run the comparison -> the exit code, 128 plus the signal's number after an interrupt. Raises UserError for
    mistakes in flags and files, and for runs that fail."""
    comparison = parse_flags(argv)
    folder = Path(comparison.output)
    sizes, base = measure(comparison)
    if not comparison.rates:
        comparison = replace(comparison, rates=usual_rates(base.config.n_embd))
    with alone_in(folder, flag="--output"):
        check_record(folder, comparison, sizes[comparison.methods[0]].parameters, base.fingerprint)
        print_sizes(sizes)
        print(f"learning rates to begin with: {' '.join(f'{rate_of(number):g}' for number in comparison.rates)}")
        return run_and_report(comparison, sizes)


def run_and_report(comparison: Comparison, sizes: Mapping[str, Size]) -> int:
    """Run all cells that are due, and report, after an interrupt too; -> the exit code."""
    try:
        complete = run_due(comparison, sizes)
    except (KeyboardInterrupt, Ended) as end:
        words, code = ending_of(end)
        print(f"\n{words}; the same command goes on", file=sys.stderr)
        report(comparison, sizes)
        return code
    report(comparison, sizes)
    if not complete:
        print(
            f"the budget of {comparison.budget:g} minutes is spent before all runs were done; the same command goes on"
        )
    return 0


def usual_rates(n_embd: int) -> tuple[int, ...]:
    """The numbers of three learning rates around Bone's automatic one on a model of n_embd channels."""
    middle = nearest_to(automatic_rate(AdapterConfig(mode="bone"), n_embd).value)
    return middle - 1, middle, middle + 1


def measure(comparison: Comparison) -> tuple[dict[str, Size], Base]:
    """({method: Size}, base). Raises UserError if a rank does not fit, or if train.py would refuse its flags."""
    first = comparison.methods[0]
    output = ["--proj_dir", comparison.output]
    request = parse_run([*comparison.train, *output, *method_flags(first, comparison.rank)])
    base = request.base
    assert base is not None  # parse_run refuses an adapter without one
    layers = Layers(base.linear_shapes[name] for name in request.layers)
    wanted = parameter_count(METHODS[first], comparison.rank, 0, layers)
    beside = parts_count(request.config.adapter.train_parts, base.family, base.config)
    sizes = {first: Size(comparison.rank, 0, wanted, beside)}
    for method in comparison.methods[1:]:
        if method == FULL:
            sizes[method] = Size(0, 0, sum(tensor.numel() for tensor in base.tensors.values()))
        elif method == STATE:
            sizes[method] = Size(0, 0, parts_count((STATE,), base.family, base.config))
        else:
            sizes[method] = matched_size(METHODS[method], wanted, layers)._replace(beside=beside)
        parse_run([*comparison.train, *output, *method_flags(method, *sizes[method][:2])])
    return sizes, base


def parameter_count(method: Method, rank: int, mini_rank: int, layers: Layers) -> int:
    """The number of parameters that a method trains on layers that the rank fits."""
    return sum(
        number * sum(math.prod(shapes[name]) for name in method.parameters)
        for layer, number in layers.items()
        for shapes in (method.tensors.shapes(sized(method, rank, mini_rank), *layer),)
    )


def parts_count(parts: Collection[str], family: Family, model: ModelConfig) -> int:
    """The number of parameters that --train_parts trains in a model of these dimensions."""
    shapes = family.shapes(model) | time_state_shapes(model)
    return sum(math.prod(shape) for key, shape in shapes.items() if family.part_of(key) in parts)


def matched_size(method: Method, wanted: int, layers: Layers) -> Size:
    """The Size with the number of parameters nearest to `wanted`; among equally near ones the rank and mini_rank that
    are nearest to each other, or without a mini_rank the lowest rank. Raises UserError if no rank fits."""
    outs = math.gcd(*(out_features for out_features, _ in layers))
    minis = [width for width in range(1, outs + 1) if outs % width == 0] if "mini_rank" in method.tensors.size else [0]
    found = [
        Size(rank, mini, parameter_count(method, rank, mini, layers))
        for rank in range(1, max(max(layer) for layer in layers) + 1)
        for mini in minis
        if fits(method, rank, mini, layers)
    ]
    if not found:
        raise UserError(f"no rank of {method.name} fits every layer of this model; leave it out of --methods")
    return min(found, key=lambda size: (abs(size.parameters - wanted), abs(size.rank - size.mini_rank)))


def fits(method: Method, rank: int, mini_rank: int, layers: Iterable[tuple[int, int]]) -> bool:
    return all(method.tensors.fit(sized(method, rank, mini_rank), *layer) is None for layer in layers)


def sized(method: Method, rank: int, mini_rank: int) -> AdapterConfig:
    """The AdapterConfig of a method's size; the rank is its first setting, under any name."""
    sizes: dict[str, Any] = dict(zip(method.tensors.size, (rank, mini_rank)))
    return AdapterConfig(**sizes)


def print_sizes(sizes: Mapping[str, Size]) -> None:
    for method, size in sizes.items():
        rank = f", rank {size.rank}" if size.rank else ""
        mini = f", mini_rank {size.mini_rank}" if size.mini_rank else ""
        print(f"{method:<13} {size.trained:>14,} trained parameters{rank}{mini}")


def run_due(comparison: Comparison, sizes: Mapping[str, Size]) -> bool:
    """Run due cells until none is left; -> False if the budget ended it."""
    deadline = time.monotonic() + 60 * comparison.budget if comparison.budget else math.inf

    def report_run(outcome: Outcome, seconds: float) -> None:
        loss = f"validation loss {outcome.loss:.4f}" if math.isfinite(outcome.loss) else "diverged"
        print(f"{outcome.cell}: {loss}, {seconds:.0f} s", flush=True)

    while cells := due(comparison):
        print(f"{counted(len(cells), 'run')} due", flush=True)
        if not run_cells(comparison, cells, sizes, deadline, report_run):
            return False
    return True


def due(comparison: Comparison) -> list[Cell]:
    losses = {cell: outcome.loss for cell, outcome in read_outcomes(comparison).items()}
    return next_cells(comparison.methods, comparison.rates, comparison.seeds, losses)


def read_outcomes(comparison: Comparison) -> dict[Cell, Outcome]:
    """{cell: Outcome} of the complete runs of the comparison's methods and seeds."""
    found = (read_outcome(path.parent) for path in sorted(Path(comparison.output).glob(f"runs/*/{RESULT}")))
    return {
        outcome.cell: outcome
        for outcome in found
        if outcome.cell.method in comparison.methods and outcome.cell.seed in comparison.seeds
    }


def report(comparison: Comparison, sizes: Mapping[str, Size]) -> None:
    """Print the table of the complete runs, and write the table, the results and the figures."""
    outcomes = read_outcomes(comparison)
    rows = rows_of(comparison.methods, comparison.seeds, sizes, outcomes)
    if not rows:
        print("no run with the first seed is complete yet")
        return
    text, folder = table(rows, comparison.seeds[0], outcomes), Path(comparison.output)
    write_text(folder / "table.md", text)
    write_text(folder / "results.jsonl", lines_of_json(sizes, outcomes))
    draw_figures(folder, rows, comparison.methods, comparison.seeds[0], outcomes)
    print(f"\n{text}\nwrote table.md, results.jsonl and figures into {folder}")
