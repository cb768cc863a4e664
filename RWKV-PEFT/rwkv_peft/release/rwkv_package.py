"""Open a .pth in the `rwkv` package, and ask it for logits.

The package decides at import whether its models are RWKV-7 (RWKV_V7_ON), and with deep embeddings (RWKV_DE_VERSION), so
one process can use it for one generation only. As a process of its own, this module asks about RWKV-7 or RWKV-7a:

    rwkv_peft.release.rwkv_package MODEL.pth TOKENS.pt LOGITS.pt x070|x070a sequence|tokens

The package does not look for tuned states in such a model's file, so they are put into its list of states there.
"""

import contextlib
import io
import os
import sys
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


def main(model_path: str, tokens_path: str, output_path: str, version: str, mode: str) -> None:
    """Write the logits (T, V) float32 of tokens (T,) int64; mode is that of logits_of."""
    tokens = torch.load(tokens_path, weights_only=True).tolist()
    model = rwkv_model(model_path, version)
    tensors = torch.load(model_path, weights_only=True, mmap=True)
    state = model.generate_zero_state()
    for layer in range(len(state) // 3):
        tuned = tensors.get(f"blocks.{layer}.att.time_state")
        if tuned is not None:
            state[3 * layer + 1] = tuned.float().clone()  # (H, N value, N key), the package's layout too
    torch.save(logits_of(model, tokens, state, mode), output_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
