"""RWKV-7a's Family: RWKV-7's, but for its own keys and model."""

from ...ops.wkv7 import backends
from ..family import Family
from ..rwkv7.keys import PARTS, TARGETS
from ..rwkv7.model import TimeMix
from . import keys
from .init import init_weights
from .model import RWKV7a


class RWKV7aFamily(Family[keys.RWKV7aConfig, RWKV7a]):
    """RWKV-7 with deep embeddings (x070a), as RWKV-LM's rwkv_v7a_demo.py computes it. It has a form as .pth only."""

    version, sign = keys.RWKV7aConfig.version, keys.SIGN
    targets, parts = TARGETS, PARTS
    rows_are_keys = TimeMix.rows_are_keys
    states_in_model = False
    kernel = "wkv7"
    tables = ("ffn.s_emb.weight",)

    dimensions = staticmethod(keys.dimensions)
    new_dimensions = staticmethod(keys.new_dimensions)
    shapes = staticmethod(keys.shapes)
    part_of = staticmethod(keys.part_of)
    learning_rate = staticmethod(keys.learning_rate)
    init_weights = staticmethod(init_weights)
    kernels = staticmethod(backends)

    def build(self, config: keys.RWKV7aConfig, grad_checkpoint: bool = False) -> RWKV7a:
        return RWKV7a(config, grad_checkpoint=grad_checkpoint)
