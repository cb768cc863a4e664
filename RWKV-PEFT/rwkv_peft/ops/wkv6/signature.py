"""The tensors of wkv6."""

from ..recurrence.signature import Signature

SIGNATURE = Signature("wkv6", rows=("r", "k", "v", "w"), shared=("u",), state_rows="key")
