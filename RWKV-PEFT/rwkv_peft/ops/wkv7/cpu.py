"""The CPU kernel as a wkv7 backend: cpu/wkv7."""

from ..recurrence.cpu import CpuRecurrence
from .reference import SIGNATURE

RECURRENCE = CpuRecurrence(SIGNATURE, tile=64)  # cpu/wkv7/chunk.h's kTile
