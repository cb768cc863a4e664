"""Generate text with a model: sampling, batched recurrent decoding, and the command `rwkv-peft generate`.

The names of __all__ are imported at first use, because flags.py, which is in this package, must not import torch.
"""

import importlib
from typing import Any

__all__ = ["Sampling", "Step", "TextStream", "generate", "load_model", "prefill", "read_state_file", "save_state_file"]
HOMES = (
    ("decode", ("Step", "generate")),
    ("reading", ("prefill",)),
    ("loading", ("load_model", "read_state_file", "save_state_file")),
    ("settings", ("Sampling",)),
    ("text", ("TextStream",)),
)


def __getattr__(name: str) -> Any:
    for module, names in HOMES:
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
