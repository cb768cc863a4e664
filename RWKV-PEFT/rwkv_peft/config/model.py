"""The dimensions of a model."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class ModelConfig:
    """The dimensions that every generation has: n_layer blocks over n_embd (C) channels; dim_att (A) = heads x
    head_size attention channels, dim_ffn (F) feed-forward channels. A generation's own class adds further dimensions
    and its `version`."""

    n_layer: int
    n_embd: int
    vocab_size: int
    dim_att: int
    dim_ffn: int
    head_size: int = 64
    version: ClassVar[str]

    @property
    def n_head(self) -> int:
        return self.dim_att // self.head_size
