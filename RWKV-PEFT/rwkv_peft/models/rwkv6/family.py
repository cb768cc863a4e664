"""RWKV-6's Family: puts the functions of models/rwkv6 behind the interface of all generations."""

from ...ops.wkv6 import backends
from ..family import Family
from . import formats, keys, model
from .model import RWKV6, TimeMix


class RWKV6Family(Family[keys.RWKV6Config, RWKV6], of=(keys, model, formats)):
    """RWKV-6 ("Finch", x060; Peng et al. 2024, arXiv 2404.05892)."""

    model, version, sign = RWKV6, keys.RWKV6Config.version, keys.SIGN
    targets, parts = keys.TARGETS, keys.PARTS
    rows_are_keys, states_in_model = TimeMix.rows_are_keys, True
    kernel, kernels = "wkv6", staticmethod(backends)
    gguf_architecture = "rwkv6"
