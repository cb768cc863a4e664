"""The CPU kernel as a wkv6 backend: cpu/wkv6."""

from ..recurrence.cpu import CpuRecurrence
from .reference import SIGNATURE

RECURRENCE = CpuRecurrence(SIGNATURE, tile=64)  # cpu/wkv6/rows.h's kTile
