"""The objectives of training, one file each, and their table. An objective is the loss that a step minimizes."""

from collections.abc import Mapping
from types import MappingProxyType

from ..config import Objective
from .distill import Distill
from .dpo import DPO
from .ipo import IPO
from .kto import KTO
from .next_token import NextToken
from .orpo import ORPO
from .simpo import SimPO

# --objective -> its class; of several that learn from the same rows the first is their default
OBJECTIVES: Mapping[str, type[Objective]] = MappingProxyType(
    {objective.name: objective for objective in (NextToken, DPO, IPO, SimPO, ORPO, KTO, Distill)}
)


def takers_of(data_type: str) -> tuple[str, ...]:
    """The names of the objectives that learn from a --data_type, the default one first."""
    return tuple(name for name, objective in OBJECTIVES.items() if data_type in objective.rows)
