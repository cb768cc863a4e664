"""RWKV-7's Family: puts the functions of models/rwkv7 behind the interface of all generations."""

from ...ops.wkv7 import backends
from ..family import Family
from . import formats, keys, model
from .model import RWKV7, TimeMix


class RWKV7Family(Family[keys.RWKV7Config, RWKV7], of=(keys, model, formats)):
    """RWKV-7 ("Goose", x070; Peng et al. 2025, arXiv 2503.14456)."""

    model, version, sign = RWKV7, keys.RWKV7Config.version, keys.SIGN
    targets, parts = keys.TARGETS, keys.PARTS
    rows_are_keys, states_in_model = TimeMix.rows_are_keys, False
    kernel, kernels = "wkv7", staticmethod(backends)
    gguf_architecture = "rwkv7"
