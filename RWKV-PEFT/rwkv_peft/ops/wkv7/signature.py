"""The tensors of wkv7."""

from ..recurrence.signature import Signature

# What the CUDA kernels that make k, a and b themselves are given besides, and what else they give: cuda/wkv7/keys.cuh.
MADE = ("low", "a0", "k_k", "k_a", "r_k", "bonus", "scales", "gbonus", "glow")
SIGNATURE = Signature("wkv7", rows=("r", "w", "k", "v", "a", "b"), shared=(), state_rows="value", further=MADE)
