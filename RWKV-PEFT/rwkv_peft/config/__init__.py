"""The settings of a run as frozen dataclasses, made once from the command line.

A field that a flag sets holds that flag's help, its argparse options, and its name if it is not the field's. The parser
of train.py, its --help and docs/train_flags.md are made from these fields (training/parser.py).
"""

import json
from dataclasses import asdict, dataclass

from .adapter import MODE_ALIASES, QUANTIZATIONS, AdapterConfig
from .data import DATA_TYPES, DataConfig
from .model import ModelConfig
from .train import BUCKET, CHUNK_CTX, STATE_LR, STRATEGIES, TrainConfig

__all__ = [
    "BUCKET",
    "CHUNK_CTX",
    "DATA_TYPES",
    "MODE_ALIASES",
    "QUANTIZATIONS",
    "STATE_LR",
    "STRATEGIES",
    "AdapterConfig",
    "DataConfig",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "to_json",
]


@dataclass(frozen=True)
class RunConfig:
    """All settings of one training run."""

    model: ModelConfig
    adapter: AdapterConfig
    data: DataConfig
    train: TrainConfig


def to_json(config: RunConfig | AdapterConfig | DataConfig) -> str:
    """Write a config dataclass as JSON text for config.json; the same settings give the same text."""
    return json.dumps(asdict(config), sort_keys=True, indent=2)
