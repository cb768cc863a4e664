"""The dimensions of a model."""

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class ModelConfig:
    """The dimensions that every generation has: n_layer blocks over n_embd (C) channels; dim_att (A) = heads x
    head_size attention channels, dim_ffn (F) feed-forward channels. A generation's own class adds further dimensions,
    its `version`, and `layer_state`, the NamedTuple of a layer's state (models/state.py)."""

    n_layer: int
    n_embd: int
    vocab_size: int
    dim_att: int
    dim_ffn: int
    head_size: int = 64
    version: ClassVar[str]
    layer_state: ClassVar[Any]

    @property
    def n_head(self) -> int:
        return self.dim_att // self.head_size
