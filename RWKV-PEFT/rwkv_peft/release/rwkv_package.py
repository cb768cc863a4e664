"""Open a .pth in the `rwkv` package, and ask it for logits.

The package decides at import whether its models are RWKV-7 (RWKV_V7_ON), and with deep embeddings (RWKV_DE_VERSION), so
one process can use it for one generation only.
"""

import contextlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

import torch


def rwkv_model(path: str | Path, version: str) -> Any:
    """Open the .pth at path, of the generation `version` (x060, x070 or x070a), in the `rwkv` package, in float32 on
    the CPU. The process must not have opened one of another generation before."""
    os.environ["RWKV_V7_ON"] = "0" if version == "x060" else "1"  # read at import, as the next is
    os.environ["RWKV_DE_VERSION"] = "1" if version == "x070a" else "0"
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # the package uses it, newer torch deprecates it
        from rwkv.model import RWKV

        return RWKV(model=str(path).removesuffix(".pth"), strategy="cpu fp32")


def logits_of(model: Any, tokens: list[int], state: Any, mode: str) -> torch.Tensor:
    """Compute the logits (T, V) float32 of T tokens from a state (None: the model's own), in one call with mode
    "sequence", or one at a time with mode "tokens"."""
    rows = []
    with torch.inference_mode():
        if mode == "sequence":
            return model.forward(tokens, state, full_output=True)[0].float().view(len(tokens), -1)
        for token in tokens:
            row, state = model.forward([token], state)
            rows.append(row.float().clone())
    return torch.stack(rows)
