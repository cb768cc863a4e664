"""RWKV-7b's Family: RWKV-7a's, but for its own keys and model."""

from ...ops.wkv7 import backends
from ..family import Family
from ..rwkv7.keys import PARTS, TARGETS
from ..rwkv7.model import TimeMix
from . import keys
from .init import init_weights
from .model import RWKV7b


class RWKV7bFamily(Family[keys.RWKV7bConfig, RWKV7b]):
    """RWKV-7 with deep embeddings and attention over them (x070b), as RWKV-LM's rwkv_v7b_demo.py computes it. It has a
    form as .pth only."""

    version, sign = keys.RWKV7bConfig.version, keys.SIGN
    targets, parts = (*TARGETS, "qkv.qq"), PARTS
    rows_are_keys = TimeMix.rows_are_keys
    states_in_model = False
    kernel = "wkv7"
    tables = ("ffn.s_emb.weight", "qkv.k_emb.weight", "qkv.v_emb.weight")

    dimensions = staticmethod(keys.dimensions)
    new_dimensions = staticmethod(keys.new_dimensions)
    shapes = staticmethod(keys.shapes)
    part_of = staticmethod(keys.part_of)
    learning_rate = staticmethod(keys.learning_rate)
    init_weights = staticmethod(init_weights)
    kernels = staticmethod(backends)

    def build(self, config: keys.RWKV7bConfig, grad_checkpoint: bool = False) -> RWKV7b:
        return RWKV7b(config, grad_checkpoint=grad_checkpoint)
