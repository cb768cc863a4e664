"""The wkv7 recurrence: one operation, several backends that compute the same thing."""

from .op import backends, wkv7

__all__ = ["backends", "wkv7"]
