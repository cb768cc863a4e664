"""A recurrence's backends by name, and the choice among them for a call."""

import functools
import logging
import warnings
from collections.abc import Mapping
from contextlib import nullcontext

import torch

from ..native.compiled import constant_when_compiled
from ..native.levels import LEVELS
from .chunked import Chunked
from .cpu import CpuRecurrence
from .cuda import CudaRecurrence

KERNELS = ("cpu", "cuda")  # backends for the type of device that they are named after; others are for any device
FALLBACK = "chunked"  # the backend that "auto" takes if there is no kernel


# One way to compute a recurrence, with its own backward. unavailable(level) -> None if it can be used, else the reason
# and the remedy; checkpoint_count(a tensor (B, T, H, N), sequences) -> the number of states that forward saves.
Backend = Chunked | CpuRecurrence | CudaRecurrence


class Backends:
    """The backends of an operation other than "reference", which is plain torch, differentiated by autograd."""

    def __init__(self, op: str, table: Mapping[str, Backend]) -> None:
        self.op, self.table = op, table

        @constant_when_compiled  # does not work on methods
        def choose(backend: str, device_type: str, index: int | None, dtype: torch.dtype) -> str:
            return self._resolve(backend, device_type, index, dtype)

        self.choose = choose

    def __getitem__(self, chosen: str) -> tuple[Backend, str]:
        """The Backend that `choose` has chosen, and its level."""
        name, _, level = chosen.partition(":")
        return self.table[name], level

    def reasons(self) -> dict[str, str | None]:
        """Every name -> None if it can be used here, else the reason and the remedy. May compile them."""
        return {"reference": None, **{name: backend.unavailable("") for name, backend in self.table.items()}}

    @functools.cache  # noqa: B019 - a Backends lives as long as its module
    def _resolve(self, backend: str, device_type: str, index: int | None, dtype: torch.dtype) -> str:
        """The backend to call: `backend` itself, or what "auto" means for this device (GPUs differ) and dtype."""
        is_gpu = device_type == "cuda" and index is not None
        with torch.cuda.device(index) if is_gpu else nullcontext():  # which backends are asked about
            return self._resolve_here(backend, device_type, dtype)

    def _resolve_here(self, backend: str, device_type: str, dtype: torch.dtype) -> str:
        if backend == "auto":
            return self._resolve_auto(device_type, dtype)
        if backend == "reference":
            return backend
        op, (name, level) = self.op, self._split(backend)
        reason = self.table[name].unavailable(level)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {backend!r} cannot be used: {reason}")
        if name in KERNELS and device_type not in (name, "meta"):
            raise ValueError(
                f"{op}: backend {name!r} with tensors on {device_type}; move them to {name}, or take 'auto'"
            )
        if dtype == torch.float64:
            raise ValueError(
                f"{op}: backend {backend!r} computes in float32, not {dtype}; convert, or take 'reference'"
            )
        return backend

    def _split(self, backend: str) -> tuple[str, str]:
        """A backend's name and, of "cpu:LEVEL", the instruction set, else "". Raises ValueError for an unknown one."""
        name, _, level = str(backend).partition(":")
        if name not in self.table or (level and (name != "cpu" or level not in LEVELS)):
            known = ", ".join(("auto", "reference", *self.table, *(f"cpu:{level}" for level in LEVELS)))
            raise ValueError(f"{self.op}: backend {backend!r} is unknown; take one of {known}")
        return name, level

    def _resolve_auto(self, device_type: str, dtype: torch.dtype) -> str:
        if dtype == torch.float64:
            return "reference"
        if device_type == "meta":
            return "cuda"  # tensors without data stand for a GPU's
        reason: str | None = f"there is no kernel for {device_type}"
        if device_type in KERNELS:
            reason = self.table[device_type].unavailable("")
        if reason is not None:
            warnings.warn(
                f"{self.op} takes backend {FALLBACK!r}, which is slow, for tensors on {device_type}: {reason}",
                RuntimeWarning,
                stacklevel=6,
            )
        chosen = device_type if reason is None else FALLBACK
        logging.getLogger(__name__).info("%s takes backend %r for tensors on %s", self.op, chosen, device_type)
        return chosen
