"""RWKV-6's Family: puts the functions of models/rwkv6 behind the interface of all generations."""

from ...ops.wkv6 import backends
from ..family import Family
from . import gguf, keys, names
from .init import init_weights
from .model import RWKV6, TimeMix


class RWKV6Family(Family[keys.RWKV6Config, RWKV6]):
    """RWKV-6 ("Finch", x060; Peng et al. 2024, arXiv 2404.05892)."""

    version, sign = keys.RWKV6Config.version, keys.SIGN
    targets, parts = keys.TARGETS, keys.PARTS
    rows_are_keys = TimeMix.rows_are_keys
    states_in_model = True
    kernel = "wkv6"
    gguf_architecture, hf_tokenizer = "rwkv6", "Rwkv6Tokenizer"

    dimensions = staticmethod(keys.dimensions)
    new_dimensions = staticmethod(keys.new_dimensions)
    shapes = staticmethod(keys.shapes)
    part_of = staticmethod(keys.part_of)
    learning_rate = staticmethod(keys.learning_rate)
    init_weights = staticmethod(init_weights)
    kernels = staticmethod(backends)
    to_hf, from_hf = staticmethod(names.to_hf), staticmethod(names.from_hf)
    to_web, from_web = staticmethod(names.to_web), staticmethod(names.from_web)
    swapped_in_web = staticmethod(names.swapped_in_web)
    hf_settings = staticmethod(names.hf_settings)
    gguf_tensors, gguf_settings = staticmethod(gguf.tensors), staticmethod(gguf.settings)

    def build(self, config: keys.RWKV6Config, grad_checkpoint: bool = False) -> RWKV6:
        return RWKV6(config, grad_checkpoint=grad_checkpoint)
