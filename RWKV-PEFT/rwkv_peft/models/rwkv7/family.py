"""RWKV-7's Family: puts the functions of models/rwkv7 behind the interface of all generations."""

from ...ops.wkv7 import backends
from ..family import Family
from . import fla, gguf, keys, names
from .init import init_weights
from .model import RWKV7, TimeMix


class RWKV7Family(Family[keys.RWKV7Config, RWKV7]):
    """RWKV-7 ("Goose", x070; Peng et al. 2025, arXiv 2503.14456)."""

    version, sign = keys.RWKV7Config.version, keys.SIGN
    targets, parts = keys.TARGETS, keys.PARTS
    rows_are_keys = TimeMix.rows_are_keys
    states_in_model = False
    kernel = "wkv7"
    gguf_architecture, hf_tokenizer = "rwkv7", "Rwkv7Tokenizer"

    dimensions = staticmethod(keys.dimensions)
    new_dimensions = staticmethod(keys.new_dimensions)
    shapes = staticmethod(keys.shapes)
    part_of = staticmethod(keys.part_of)
    learning_rate = staticmethod(keys.learning_rate)
    init_weights = staticmethod(init_weights)
    kernels = staticmethod(backends)
    to_hf, from_hf = staticmethod(names.to_hf), staticmethod(names.from_hf)
    from_fla = staticmethod(fla.from_fla)
    to_web, from_web = staticmethod(names.to_web), staticmethod(names.from_web)
    swapped_in_web = staticmethod(names.swapped_in_web)
    hf_settings = staticmethod(names.hf_settings)
    gguf_tensors, gguf_settings = staticmethod(gguf.tensors), staticmethod(gguf.settings)

    def build(self, config: keys.RWKV7Config, grad_checkpoint: bool = False) -> RWKV7:
        return RWKV7(config, grad_checkpoint=grad_checkpoint)
