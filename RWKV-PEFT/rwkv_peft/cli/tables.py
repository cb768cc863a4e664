"""The tables of generations, samplings and tasks by name. Entries are imported on first use, so that flags are checked
by the names before torch is imported.
"""

import importlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any


class LazyTable(Mapping[str, Any]):
    """A Mapping made of {name: "module:class"}, with modules of this package."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self.places = MappingProxyType(dict(places))

    def __getitem__(self, name: str) -> Any:
        module, _, thing = self.places[name].partition(":")
        return getattr(importlib.import_module(f"rwkv_peft.{module}"), thing)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


# --model_version -> its Family; the first is the default of a new model
GENERATIONS = LazyTable(
    {
        "x060": "models.rwkv6.family:RWKV6Family",
        "x070": "models.rwkv7.family:RWKV7Family",
        "x070a": "models.rwkv7a.family:RWKV7aFamily",
        "x070b": "models.rwkv7b.family:RWKV7bFamily",
    }
)
# --dataload -> how a data set becomes Samples
SAMPLINGS = LazyTable(
    {
        "get": "data.samples:WindowSamples",
        "pad": "data.samples:PaddedSamples",
        "only": "data.samples:SingleSamples",
        "pack": "data.samples:PackedSamples",
    }
)
# --optim, besides AdamW
OPTIMS = LazyTable({"adamw8bit": "training.optimizers:adamw8bit", "muon": "training.optimizers:muon"})
# tasks of `rwkv-peft eval` and --eval_task over rows of one's own
TASKS = LazyTable({"jsonl": "evals.rows:Exact", "choices": "evals.rows:Choices"})
