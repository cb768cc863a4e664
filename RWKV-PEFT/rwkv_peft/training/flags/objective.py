"""Choose a run's objective, and refuse flags that do not go with it, before there is a model."""

import argparse
from collections.abc import Iterator

from ...config import Objective
from ...objectives import OBJECTIVES, takers_of
from .parser import settings_of


def objective_of(args: argparse.Namespace) -> Objective:
    """Make the objective that --objective names, or else the default one for --data_type."""
    return settings_of(args, OBJECTIVES[args.objective or takers_of(args.data_type)[0]])


def check_objective(args: argparse.Namespace, objective: Objective) -> Iterator[str]:
    """Yield the refusal of data that the objective does not learn from."""
    if args.data_type not in objective.rows:
        yield (
            f"--objective {objective.name} learns from --data_type {' or '.join(objective.rows)}, and the data is "
            f"{args.data_type}; give such data, or --objective {' or '.join(takers_of(args.data_type))}"
        )
