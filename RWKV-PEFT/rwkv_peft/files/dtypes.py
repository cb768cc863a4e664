"""The dtypes of weights, by the names that flags and files give them."""

from types import MappingProxyType

import torch

DTYPES = MappingProxyType({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32})


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch.", such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
