"""RWKV-7a's Family: RWKV-7's, but for its own keys and model."""

from ...ops.wkv7 import backends
from ..family import Family
from ..rwkv7.model import TimeMix
from . import keys, model
from .model import RWKV7a


class RWKV7aFamily(Family[keys.RWKV7aConfig, RWKV7a], of=(keys, model)):
    """RWKV-7 with deep embeddings (x070a), as RWKV-LM's rwkv_v7a_demo.py computes it. It has a form as .pth only."""

    model, version, sign = RWKV7a, keys.RWKV7aConfig.version, keys.SIGN
    targets, parts, tables = keys.TARGETS, keys.PARTS, keys.EMBEDDINGS
    rows_are_keys, states_in_model = TimeMix.rows_are_keys, False
    kernel, kernels = "wkv7", staticmethod(backends)
