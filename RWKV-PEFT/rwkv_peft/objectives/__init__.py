"""The objectives of training, one file each, and their table. An objective is the loss that a step minimizes."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from types import MappingProxyType

from ..cli.rules import EXCLUDES, NEEDS, Rule
from ..config import Objective
from ..config.objective import BASE, OF_BASE, Exclusion
from ..config.setting import flag_of
from .distill import Distill
from .dpo import DPO
from .grpo import GRPO
from .ipo import IPO
from .kto import KTO
from .next_token import NextToken
from .orpo import ORPO
from .simpo import SimPO

# --objective -> its class; of several that learn from the same rows the first is their default
OBJECTIVES: Mapping[str, type[Objective]] = MappingProxyType(
    {objective.name: objective for objective in (NextToken, DPO, IPO, SimPO, ORPO, KTO, GRPO, Distill)}
)


def takers_of(data_type: str) -> tuple[str, ...]:
    """The names of the objectives that learn from a --data_type, the default one first."""
    return tuple(name for name, objective in OBJECTIVES.items() if data_type in objective.rows)


def excluded(objective: type[Objective]) -> tuple[Exclusion, ...]:
    """The flags and methods that an objective does not go with."""
    return objective.excludes + (OF_BASE if BASE in objective.needs else ())


def rules() -> Iterator[Rule]:
    """Yield the rules of objectives: exclusions, and flags that belong to one."""
    for exclusion in dict.fromkeys(each for one in OBJECTIVES.values() for each in excluded(one)):
        those = [name for name, one in OBJECTIVES.items() if exclusion in excluded(one)]
        yield Rule(f"--objective {'|'.join(those)}", EXCLUDES, *exclusion)
    for objective in OBJECTIVES.values():
        yield from objective.rules
    for flag in FLAGS:
        those = [name for name, one in OBJECTIVES.items() if flag in map(flag_of, fields(one))]
        rows = " or ".join(dict.fromkeys(row for name in those for row in OBJECTIVES[name].rows))
        why = f"it is a setting of that, which learns from --data_type {rows}"
        yield Rule(f"--{flag}", NEEDS, f"--objective {'|'.join(those)}", why)


# {flag: its field} of all objectives
FLAGS = MappingProxyType({flag: each for one in OBJECTIVES.values() for each in fields(one) if (flag := flag_of(each))})
RULES = tuple(rules())
