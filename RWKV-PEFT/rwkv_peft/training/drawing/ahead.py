"""Keeps the answers that were drawn ahead in checkpoints, a file of each rank, because weights that are gone drew
them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from .answers import Drawn

FILE = "drawn-{}.jsonl"  # of a rank


def write_drawn(folder: Path, rank: int, drawn: Mapping[int, Sequence[Drawn]]) -> None:
    """Write the answers to samples, by their numbers; nothing if there are none."""
    if drawn:
        lines = (json.dumps([number, answer]) + "\n" for number, answers in drawn.items() for answer in answers)
        (folder / FILE.format(rank)).write_text("".join(lines))


def read_drawn(folder: Path) -> dict[int, list[Drawn]]:
    """The answers of all ranks in a checkpoint, by the numbers of their samples."""
    found: dict[int, list[Drawn]] = {}
    for path in folder.glob(FILE.format("*")):
        for line in path.read_text().splitlines():
            number, answer = json.loads(line)
            found.setdefault(number, []).append(Drawn(*answer))
    return found
