"""The settings of a run as frozen dataclasses, made once from the command line.

Each field that a flag sets carries it: its help, its type, its name where that is another than the field's. The parser
of train.py, its --help and docs/reference/flags.md are made of these fields (training/flags/request.py).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .adapter import CHOICES, MINI, QUANTIZATIONS, WORDS, AdapterConfig, Word, forms, problems
from .data import DATA_TYPES, OF_ROWS, DataConfig
from .model import ModelConfig
from .objective import Objective
from .train import BUCKET, CHUNK_CTX, FEW, STATE_LR, STATE_LR_ALONE, STRATEGIES, TrainConfig


@dataclass(frozen=True)
class RunConfig:
    """All settings of one training run; flags are those that it was started with (training/flags/parser.py)."""

    model: ModelConfig
    adapter: AdapterConfig
    data: DataConfig
    train: TrainConfig
    objective: Objective
    flags: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def step_samples(self) -> int:
        """The number of samples in an optimizer step."""
        return self.data.micro_bsz * self.train.groups * self.train.accumulate_grad_batches


def to_json(config: RunConfig | AdapterConfig | DataConfig) -> str:
    """Write a config dataclass as JSON text for config.json; the same settings give the same text."""
    return json.dumps(asdict(config), sort_keys=True, indent=2)
