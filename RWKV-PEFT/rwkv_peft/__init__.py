"""Bone fine-tuning for RWKV: models, wkv kernels, adapters, data, training, release.

    import rwkv_peft as rp

The names of __all__ are imported at first use, so that this import costs nothing.
"""

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api.adapters import add_adapter, merge, save_adapter
    from .api.completions import CompletionOutput, Piece
    from .api.model import Model, load, tokenizer
    from .api.train import train
    from .cli.errors import UserError
    from .inference.settings import Sampling
    from .models.state import State

__all__ = [
    "CompletionOutput",
    "Model",
    "Piece",
    "Sampling",
    "State",
    "UserError",
    "add_adapter",
    "load",
    "merge",
    "save_adapter",
    "tokenizer",
    "train",
]
__version__ = "0.3.0"
HOMES = (
    ("api.adapters", ("add_adapter", "merge", "save_adapter")),
    ("api.completions", ("CompletionOutput", "Piece")),
    ("api.model", ("Model", "load", "tokenizer")),
    ("api.train", ("train",)),
    ("cli.errors", ("UserError",)),
    ("inference.settings", ("Sampling",)),
    ("models.state", ("State",)),
)

# GNU OpenMP's threads spin while they wait for each other. If another program uses the same cores, the spinning takes
# time from the thread that is waited for: two runs side by side slow each other down many times. A short spin costs
# nothing measurable if the cores are free. The library reads this variable when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _concerns_users(record: logging.LogRecord) -> bool:
    """Return False for bitsandbytes' warning, at import, that a kernel could be downloaded: nothing here would use
    it."""
    return "kernels-community" not in str(record.msg)


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_concerns_users)


def __getattr__(name: str) -> Any:
    for module, names in HOMES:
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
