"""The CUDA kernels of one source, which take one structure by value: built on first use, and tried once on each GPU."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from . import gpu
from .kernels import Block, Kernels, Library, Module
from .library import BuildError

DTYPES = MappingProxyType({torch.float32: "float32", torch.bfloat16: "bfloat16"})  # as in kernels' names


class CudaFamily:
    """The kernels of one source below cuda/. trial(kernels, device) runs one of them on a GPU."""

    def __init__(
        self,
        op: str,
        source: str,
        names: Sequence[str],
        structure: type[ctypes.Structure],
        trial: Callable[[Kernels, int], None],
    ) -> None:
        self.op, self.source, self._trial = op, source, trial
        self.library: Callable[[str | Path], Kernels] = functools.partial(Library, names, structure)
        self.module: Callable[[bytes], Kernels] = functools.partial(Module, names)

    @functools.cache  # noqa: B019 - families live as long as their modules
    def kernels(self, device: int) -> Kernels:
        """The kernels for GPU number `device`, built on first use. Raises BuildError, uncached, if that fails."""

        def trial(built: Kernels) -> None:
            with torch.cuda.device(device):
                self._trial(built, device)
                torch.cuda.synchronize()

        return gpu.build_kernels(f"{self.op}_cuda", self.source, device, self.library, self.module, trial)

    @functools.cache  # noqa: B019
    def available(self, device: int) -> bool:
        """True if they work on GPU number `device`."""
        return self.unavailable(device) is None

    def unavailable(self, device: int | None = None) -> str | None:
        """None if they work on a GPU, by default the current one, else the reason and the remedy."""
        reason = gpu.unavailable(device)
        if reason is not None:
            return reason
        try:
            self.kernels(torch.cuda.current_device() if device is None else device)
        except BuildError as error:
            return str(error)
        return None

    def takes(self, first: Tensor, *others: Tensor | None) -> bool:
        """True if the kernels take these tensors (None: not given): real ones on one GPU, all float32 or all bfloat16.
        Tensors without data, with which a GPU's memory is planned, are taken like a GPU's."""
        if (
            first.dtype not in DTYPES
            or first.numel() == 0
            or not all([x is None or (x.dtype == first.dtype and x.device == first.device) for x in others])
            or torch.compiler.is_compiling()
            or type(first) is not Tensor  # a fake one
        ):
            return False
        return first.is_meta or first.is_cuda and self.available(first.device.index)

    def run(
        self,
        name: str,
        arguments: ctypes.Structure,
        like: Tensor,
        blocks: int,
        block: Block | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """Enqueue a kernel on the GPU of `like`, over `blocks` blocks of `block` threads (None: its own). kernels:
        those to take in place of that GPU's. Does nothing for tensors without data; RuntimeError if it fails."""
        if like.is_meta or not blocks:
            return
        with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
            built = self.kernels(like.device.index) if kernels is None else kernels
            status = built.run(name, arguments, blocks, block, stream(like))
        if status != 0:
            raise RuntimeError(f"{self.op}: launching the CUDA kernel {name} failed with CUDA error {status}")


def stream(x: Tensor) -> int | None:
    """torch's current stream on the tensor's GPU; None on the CPU, where the tests run kernels."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
