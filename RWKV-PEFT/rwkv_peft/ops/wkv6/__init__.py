"""The wkv6 recurrence: one operation, several backends that compute the same thing."""

from .op import backends, wkv6

__all__ = ["backends", "wkv6"]
