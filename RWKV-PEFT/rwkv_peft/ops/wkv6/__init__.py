"""The wkv6 recurrence: one operation, several backends that compute the same thing."""

from .gated import wkv6_gated
from .op import backends, wkv6

__all__ = ["backends", "wkv6", "wkv6_gated"]
