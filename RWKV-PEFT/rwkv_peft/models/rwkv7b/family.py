"""RWKV-7b's Family: RWKV-7a's, but for its own keys and model."""

from ...ops.wkv7 import backends
from ..family import Family
from ..rwkv7.model import TimeMix
from . import keys, model
from .model import RWKV7b


class RWKV7bFamily(Family[keys.RWKV7bConfig, RWKV7b], of=(keys, model)):
    """RWKV-7 with deep embeddings and attention over them (x070b), as RWKV-LM's rwkv_v7b_demo.py computes it. It has a
    form as .pth only."""

    model, version, sign = RWKV7b, keys.RWKV7bConfig.version, keys.SIGN
    targets, parts, tables = keys.TARGETS, keys.PARTS, keys.EMBEDDINGS
    rows_are_keys, states_in_model = TimeMix.rows_are_keys, False
    kernel, kernels = "wkv7", staticmethod(backends)
