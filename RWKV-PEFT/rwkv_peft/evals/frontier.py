"""The largest scale of a change at which rows lose no more than allowed, and what is measured to find it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoints.atomic import write_text
from ..checkpoints.base import Base, base_of
from ..cli.errors import UserError
from ..data.masks import undesirable
from ..data.samples import Document, Samples
from ..inference.forward import prefill
from ..inference.loading import model_of
from ..models.parts import LanguageModel
from ..models.state import State
from ..plots import look, new_figure, plain_axes, save_figure
from ..release.compatibility import Adapters
from ..release.merge import MergeOptions, merged_tensors
from .questions import last_answer
from .scoring import score

SCORED = 16  # answers that are scored at once
MEASURED = 128  # rows of a kind that are measured, at most
GRID, HALVINGS = (0.0, 0.25, 0.5, 0.75, 1.0), 4  # scales that are measured, and between two of them
KEPT = "to keep"

Answers = Mapping[tuple[int, ...], Sequence[tuple[list[int], list[int]]]]  # by context: tokens of prompts and answers


class Likelihood(NamedTuple):
    """A model's mean loss of rows, in nats a token, and the share of answers that are its own word for word, None if
    they were not compared."""

    nats: float
    right: float | None = None

    def __str__(self) -> str:
        return f"{self.nats:.3f} nats a token" + ("" if self.right is None else f", {self.right:.0%} word for word")


class Point(NamedTuple):
    """What a model answers at a scale of a change: {name of rows: Likelihood}."""

    scale: float
    rows: Mapping[str, Likelihood]


def likelihood(model: LanguageModel, start: State | None, answers: Answers) -> Likelihood:
    """The Likelihood of answers; each context is read once, from start (None: zeros)."""
    logprob, right, tokens, number = 0.0, 0, 0, 0
    for context, pairs in answers.items():
        begun = prefill(model, [list(context)], start)[1] if context else start
        for first in range(0, len(pairs), SCORED):
            prompts, texts = zip(*pairs[first : first + SCORED])
            for [found] in score(model, prompts, [[text] for text in texts], begun):
                logprob += found.logprob
                right += found.greedy
        tokens, number = tokens + sum(len(text) for _, text in pairs), number + len(pairs)
    return Likelihood(-logprob / tokens, right / number)


def answers_in(samples: Samples) -> Answers:
    """The last answers in up to MEASURED samples; all of a text behind its first token. Raises UserError if there are
    none."""

    def pair(tokens: torch.Tensor, mask: torch.Tensor) -> tuple[list[int], list[int]] | None:
        if found := last_answer((tokens, mask)):
            return list(found[0]), list(found[1])
        text = mask.all() and not undesirable(mask)
        return (tokens[:1].tolist(), tokens[1:].tolist()) if text else None

    rows = [samples[n] for n in range(min(len(samples), MEASURED))]
    documents: list[Document] = [each for row in rows for each in (row if isinstance(row, list) else [row])]
    if not (pairs := [found for document in documents if (found := pair(*document))]):
        raise UserError("rows to measure hold no answer that counts in the loss; name rows with answers")
    return {(): pairs}


def frontier(at: Callable[[float], Point], most: float) -> tuple[list[Point], Point]:
    """(the Points at the scales of GRID and, by bisection, beside the largest that holds, in order; that Point).

    A Point holds if the rows to keep lose at most `most` nats a token beside scale 0."""
    points = [at(scale) for scale in GRID]
    limit = points[0].rows[KEPT].nats + most
    place = max(n for n, point in enumerate(points) if point.rows[KEPT].nats <= limit)
    best, above = points[place], GRID[place + 1 :][:1]
    for _ in range(HALVINGS if above else 0):
        points.append(middle := at((best.scale + above[0]) / 2))
        if middle.rows[KEPT].nats <= limit:
            best = middle
        else:
            above = (middle.scale,)
    return sorted(points, key=lambda point: point.scale), best


def merged_frontier(
    base: Base, adapters: Adapters, samples: Samples, most: float, options: MergeOptions
) -> tuple[list[Point], Point]:
    """The frontier of adapters on a Base, by merges in float32: a scale multiplies the amount of each. Raises UserError
    as Merge does."""
    answers, options = answers_in(samples), replace(options, dtype=torch.float32)

    def at(scale: float) -> Point:
        scaled = [(name, adapter._replace(amount=adapter.amount * scale)) for name, adapter in adapters]
        merged = base_of(merged_tensors(base, scaled, options), base.path) if scale else base
        return Point(scale, {KEPT: likelihood(*model_of(merged, "fp32", options.device), answers)})

    return frontier(at, most)


def table(points: Sequence[Point], best: Point) -> str:
    """A line for each Point: nats a token, and the share of answers word for word, of each kind of rows."""
    lines = ["scale   " + "".join(f"{name:>20}" for name in best.rows)]
    for point in points:
        cells = [
            f"{found.nats:>20.3f}" if found.right is None else f"{found.nats:>13.3f} {found.right:>6.0%}"
            for found in point.rows.values()
        ]
        lines.append(f"{point.scale:<8.4g}{''.join(cells)}" + "  <" * (point is best))
    return "\n".join(lines)


def write_figures(points: Sequence[Point], most: float, path: Path, facts: Mapping[str, Any]) -> None:
    """Write Points as JSON, beside other facts on them."""
    lines = [{"scale": point.scale} | {name: found._asdict() for name, found in point.rows.items()} for point in points]
    write_text(path, json.dumps({**facts, "forget_at_most": most, "frontier": lines}, indent=2) + "\n")


def draw(points: Sequence[Point], best: Point, most: float, path: Path) -> None:
    """Draw what is learned of each kind of rows over what those to keep lose, in nats a token."""
    figure = new_figure(6.5, 4)
    axes, kept = figure.add_subplot(), [point.rows[KEPT].nats - points[0].rows[KEPT].nats for point in points]
    for number, name in enumerate(name for name in best.rows if name != KEPT):
        axes.plot(
            kept, [point.rows[name].nats for point in points], marker="o", markersize=3.5, label=name, **look(number)
        )
        axes.plot(kept[points.index(best)], best.rows[name].nats, marker="o", markersize=9, **look(number))
    if most < 2 * max(kept):  # a bound far away would leave no room for the curves
        axes.axvline(most, color="gray", linewidth=0.8, linestyle=":", label="--forget_at_most")
    axes.set(
        xlabel="lost on the rows to keep, nats a token", ylabel="loss, nats a token", title=f"scale {best.scale:.3g}"
    )
    axes.legend(frameon=False, fontsize="small")
    plain_axes(axes)
    save_figure(figure, path)
