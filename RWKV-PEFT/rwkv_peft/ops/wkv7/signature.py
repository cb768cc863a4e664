"""The tensors of wkv7."""

from ..recurrence.signature import Signature

SIGNATURE = Signature(
    "wkv7", rows=("r", "w", "k", "v", "a", "b"), shared=(), state_rows="value", further=("r_k", "gbonus")
)
