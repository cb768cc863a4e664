"""--forget_at_most: what a run trained is scaled back after its last step, until the rows to retain lose no more."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from ..evals.frontier import GRID, HALVINGS, KEPT, Likelihood, Point, draw, frontier, table, write_figures
from .engine import TrainingEngine
from .inputs import RETAINED, VALIDATION
from .measuring import Validator, means
from .saving.saver import Saver

REMEDY = "read more of what is not to be lost (--replay), or allow more"
NAMES: Mapping[str, str] = MappingProxyType({VALIDATION: "held out", RETAINED: KEPT})


class Bound:
    """Scales what trained back along the line from the run's start to its end, in the float32 masters, to the largest
    scale at which the rows of RETAINED lose `most` nats a token at most (evals/frontier.py).

    All ranks call apply() when the last step is saved. points and best: what was measured then; none before. `figures`
    and `picture` are the files that rank 0 writes.
    """

    def __init__(self, validator: Validator, saver: Saver | None, most: float, figures: Path, picture: Path) -> None:
        self.validator, self.saver, self.most = validator, saver, most
        self.figures, self.picture = figures, picture
        self.points: list[Point] = []
        self.best: Point | None = None

    @property
    def fails(self) -> bool:
        """True if each part of what was trained loses too much."""
        return self.best is not None and not self.best.scale

    @torch.no_grad()
    def apply(self, engine: TrainingEngine, say: Callable[[str], object]) -> None:
        """Find the scale, move the model there, and save it as the newest tensors. If no scale holds, nothing moves."""
        end = engine.copies()
        say(f"measuring what is lost at up to {len(GRID) + HALVINGS} scales of what was trained (--forget_at_most)")

        def move(scale: float) -> None:
            for flat, first, last in zip(engine.flats, engine.firsts, end):
                flat.data.copy_(torch.lerp(first, last, scale))  # at 0 and 1 exactly first and last
            engine.publish()

        def at(scale: float) -> Point:
            move(scale)
            losses = {}
            for name, samples in self.validator.measured.items():
                parts = [self.validator.sums(part, engine) for part in samples.parts]
                losses[NAMES[name]] = Likelihood(means([sum(each) for each in zip(*parts)])[0])
            return Point(scale, losses)

        self.points, self.best = frontier(at, self.most)
        move(self.best.scale or 1)
        if self.saver is None:
            return
        if 0 < self.best.scale < 1:
            self.saver.save_tensors(engine, [""])
        if engine.rank == 0:
            write_figures(self.points, self.most, self.figures, {"scale": self.best.scale})
            if len(self.validator.measured) > 1:
                draw(self.points, self.best, self.most, self.picture)

    def lines(self) -> Iterator[str]:
        """Yield the lines to print at the end of a run: the table, and what follows from it."""
        if self.best is None:
            return
        yield from table(self.points, self.best).splitlines()
        lost = self.best.rows[KEPT].nats - self.points[0].rows[KEPT].nats
        if self.fails:
            yield f"each part loses more than {self.most:g} nats a token: all is kept; {REMEDY}"
        else:
            yield f"{self.best.scale:.1%} of what was trained is kept, which loses {lost:.4f} nats a token"
