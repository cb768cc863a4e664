"""Run the `rwkv` package on an RWKV-7 or RWKV-7a model, in a process of its own.

    rwkv_peft.release.rwkv7_process MODEL.pth TOKENS.pt LOGITS.pt x070|x070a sequence|tokens

One process can use the package for one generation only (rwkv_package.py), and the caller may have used it for RWKV-6.
The package does not look for tuned states in an RWKV-7 model's file, so they are put into its list of states here.
"""

import sys

import torch

from .rwkv_package import logits_of, rwkv_model


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
