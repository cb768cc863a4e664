"""`rwkv-peft compare`: match sizes, sweep rates, repeat the best with other seeds, report; flags.py has the usage."""

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...checkpoints.atomic import write_text
from ...checkpoints.base import Base
from ...checkpoints.lock import alone_in
from ...cli.errors import Ended, ending_of
from ...cli.parser import counted
from ...config import AdapterConfig
from ...training.flags.request import Request, parse_run
from ...training.rates import automatic_rate
from ..plan.memory import count
from .flags import RANKLESS, Comparison, method_flags, parse_flags
from .report import draw, lines_of_json, rows_of, table
from .runs import RESULT, Outcome, check_record, read_outcome, run_cell
from .sweep import Cell, Layers, Size, matched_size, nearest_to, next_cells, parameter_count, rate_of


def main(argv: list[str]) -> int:
    """Run the comparison -> the exit code, 128 plus the signal's number after an interrupt. Raises UserError for
    mistakes in flags and files, and for runs that fail."""
    comparison = parse_flags(argv)
    folder = Path(comparison.output)
    sizes, base = measure(comparison)
    if not comparison.rates:
        comparison = replace(comparison, rates=usual_rates(base.config.n_embd))
    with alone_in(folder, flag="--output"):
        check_record(folder, comparison, sizes[comparison.methods[0]].trained, base.fingerprint)
        for method, size in sizes.items():
            ranks = "".join(f", {name} {size[n]}" for n, name in enumerate(("rank", "mini_rank")) if size[n])
            print(f"{method:<13} {size.trained:>14,} trained parameters{ranks}")
        print(f"learning rates to begin with: {' '.join(f'{rate_of(number):g}' for number in comparison.rates)}")
        code = 0
        try:
            run_due(comparison, sizes)
        except (KeyboardInterrupt, Ended) as end:
            words, code = ending_of(end)
            print(f"\n{words}; the same command goes on", file=sys.stderr)
        report(comparison, sizes)
    return code


def usual_rates(n_embd: int) -> tuple[int, ...]:
    """The numbers of three learning rates around Bone's automatic one on a model of n_embd channels."""
    middle = nearest_to(automatic_rate(AdapterConfig(mode="bone"), n_embd).value)
    return middle - 1, middle, middle + 1


def measure(comparison: Comparison) -> tuple[dict[str, Size], Base]:
    """({method: Size}, base). Raises UserError if a rank does not fit, or if train.py would refuse its flags."""

    def request(method: str, *ranks: int) -> Request:
        return parse_run([*comparison.train, "--proj_dir", comparison.output, *method_flags(method, *ranks)])

    first = comparison.methods[0]
    found = request(first, comparison.rank)
    base = found.base
    assert base is not None  # parse_run refuses an adapter without one
    layers = Layers(base.linear_shapes[name] for name in found.layers)
    wanted, sizes = parameter_count(first, comparison.rank, 0, layers), dict[str, Size]()
    for method in comparison.methods:
        ranks = 0, 0
        if method == first:
            ranks = comparison.rank, 0
        elif method not in RANKLESS:
            ranks = matched_size(method, wanted, layers)
        sizes[method] = Size(*ranks, count(base.config, request(method, *ranks).config.adapter).trains)
    return sizes, base


def run_due(comparison: Comparison, sizes: Mapping[str, Size]) -> None:
    """Run due cells until none is left."""
    while cells := due(comparison):
        print(f"{counted(len(cells), 'run')} due", flush=True)
        for cell in cells:
            began = time.monotonic()
            loss = run_cell(comparison, cell, sizes[cell.method]).loss
            words = f"validation loss {loss:.4f}" if math.isfinite(loss) else "diverged"
            print(f"{cell}: {words}, {time.monotonic() - began:.0f} s", flush=True)


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
    """Print the table of the complete runs, and write the table, the results and the picture."""
    outcomes, folder = read_outcomes(comparison), Path(comparison.output)
    rows = rows_of(comparison.methods, comparison.seeds, sizes, outcomes)
    if not rows:
        print("no run with the first seed is complete yet")
        return
    text = table(rows)
    write_text(folder / "table.md", text)
    write_text(folder / "results.jsonl", lines_of_json(sizes, outcomes))
    draw(folder / "comparison.png", rows, comparison.seeds[0], outcomes)
    print(f"\n{text}\nwrote table.md, results.jsonl and comparison.png into {folder}")
