"""Choose a run's objective, and refuse flags that do not go with it, before there is a model."""

import argparse
from collections.abc import Iterator
from dataclasses import fields

from ...config import AdapterConfig, DataConfig, Objective, TrainConfig
from ...objectives import OBJECTIVES, takers_of
from ...rules import words_of
from .parser import flag_of, settings_of


def objective_of(args: argparse.Namespace) -> Objective:
    """Make the objective that --objective names, or else the default one for --data_type."""
    return settings_of(args, OBJECTIVES[args.objective or takers_of(args.data_type)[0]])


def check_objective(args: argparse.Namespace, objective: Objective) -> Iterator[str]:
    """Yield refusals of data that the objective does not learn from, and of flags of other objectives."""
    if args.data_type not in objective.rows:
        yield (
            f"--objective {objective.name} learns from --data_type {' or '.join(objective.rows)}, and the data is "
            f"{args.data_type}; give such data, or --objective {' or '.join(takers_of(args.data_type))}"
        )
    for other in OBJECTIVES.values():
        for field in fields(other):
            flag = str(flag_of(field))
            value = getattr(args, flag)
            value = tuple(value) if isinstance(value, list) else value
            if not isinstance(objective, other) and value != field.default:
                yield (
                    f"--{flag} {' '.join(words_of(value))} belongs to --objective {other.name} (of --data_type "
                    f"{' or '.join(other.rows)}), and the objective is {objective.name} (of {args.data_type}); give "
                    f"that objective and data, or leave --{flag} out"
                )


def check_rules(objective: Objective, adapter: AdapterConfig, data: DataConfig, train: TrainConfig) -> Iterator[str]:
    """Yield refusals by the objective's rules, unless the data is refused already."""
    if data.data_type not in objective.rows:
        return
    for contradicts, flag, why in objective.rules(adapter, data, train):
        if contradicts:
            yield f"--objective {objective.name} (of --data_type {data.data_type}) does not go with {flag}: {why}"
