"""The tensors of wkv7."""

from ..recurrence.signature import Signature

# Further inputs and outputs of the CUDA kernels that make k, a and b themselves: cuda/wkv7/keys.cuh.
MADE = ("low", "a0", "k_k", "k_a", "r_k", "bonus", "scales", "gbonus", "glow")
SIGNATURE = Signature("wkv7", rows=("r", "w", "k", "v", "a", "b"), shared=(), state_rows="value", further=MADE)
