"""Adapters: layers that replace nn.Linear by name, train a few parameters, and merge back exactly.

inject.py finds and replaces; bone.py, bat.py and lora.py are the layers over base.py; functional.py
and weight_side.py compute them without a merged weight; delta.py says in plain arithmetic what they
add to the weight; quant.py is the quantized base.
"""

from .base import AdapterLinear
from .delta import delta, merged
from .groups import parameter_groups
from .inject import ADAPTERS, InjectReport, check_adapter, count_parameters, inject, linear_shapes, part_of

__all__ = [
    "ADAPTERS",
    "AdapterLinear",
    "InjectReport",
    "check_adapter",
    "count_parameters",
    "delta",
    "inject",
    "linear_shapes",
    "merged",
    "parameter_groups",
    "part_of",
]
