"""The CUDA kernels of one source, which take one structure by value: compiled by NVRTC on first use."""

import ctypes
import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...gpus import refusal
from . import nvrtc
from .compiled import constant_when_compiled
from .kernels import Block, Kernels
from .library import BuildError

DTYPES = MappingProxyType({torch.float32: "float32", torch.bfloat16: "bfloat16"})  # as in kernels' names
OLDEST_CAPABILITY = (8, 0)  # the first with cp.async and bf16 products


class CudaFamily:
    """The kernels of cuda/OP/OP.cu. in_graphs: as in CpuFamily."""

    def __init__(
        self, op: str, names: Sequence[str], structure: type[ctypes.Structure], in_graphs: bool = False
    ) -> None:
        self.op, self.source, self.names, self.structure = op, f"{op}/{op}.cu", names, structure
        self.in_graphs = in_graphs

        @constant_when_compiled  # does not work on methods
        @functools.cache
        def available(device: int) -> bool:
            return self.unavailable(device) is None

        self.available = available

    @functools.cache  # noqa: B019 - families live as long as their modules
    def kernels(self, device: int) -> Kernels:
        """The kernels for GPU number `device`, of the first NVRTC whose code loads there. Raises BuildError, uncached,
        with the reason of each, if there is none."""
        reasons = []
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # makes torch's context the thread's current one
            for compiler in nvrtc.compilers():
                try:
                    return self._built(compiler, torch.cuda.get_device_capability(device))
                except BuildError as error:
                    reasons.append(f"NVRTC {compiler.version}: {error}")
        raise BuildError("\n".join(reasons) or "no NVRTC, CUDA's compiler, is here; pip install nvidia-cuda-nvrtc")

    def _built(self, compiler: nvrtc.Nvrtc, capability: tuple[int, int]) -> Kernels:
        """Load what one NVRTC compiles; compile code anew once that does not load, because the cache may hold that of
        another release with the same version."""
        given = f"{self.op}_cuda", self.source, f"sm_{compiler.architecture_for(capability)}", compiler
        image = nvrtc.cubin(*given)
        try:
            return Kernels(self.names, image)
        except BuildError:
            return Kernels(self.names, nvrtc.cubin(*given, anew=True))

    def unavailable(self, device: int | None = None) -> str | None:
        """None if they work on a GPU, by default the current one, else the reason and the remedy."""
        reason = misfit(device)
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
            or (torch.compiler.is_compiling() and not self.in_graphs)
            or type(first) is not Tensor  # a fake one
        ):
            return False
        return first.is_meta or first.is_cuda and self.available(first.device.index)

    def run(self, name: str, like: Tensor, given: Mapping[str, Any], blocks: int, block: Block | None = None) -> None:
        """Enqueue a kernel on the GPU of `like`, over `blocks` blocks of `block` threads (None: its own). given: the
        structure's fields by name: tensors, whose addresses they are (None: null), and numbers. Does nothing for
        tensors without data; RuntimeError if it fails."""
        if like.is_meta or not blocks:
            return
        values = {key: x.data_ptr() if isinstance(x, Tensor) else x for key, x in given.items()}
        arguments = self.structure(**values)
        with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
            status = self.kernels(like.device.index).run(name, arguments, blocks, block, stream(like))
        if status != 0:
            raise RuntimeError(f"{self.op}: launching the CUDA kernel {name} failed with CUDA error {status}")


def stream(x: Tensor) -> int | None:
    """torch's current stream on the tensor's GPU; None on the CPU, where the tests run kernels."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None


def misfit(device: int | None = None) -> str | None:
    """None if the kernels are written for a GPU (its number, or the current one), else the reason and the remedy."""
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs, and the kernels are CUDA; take backend 'reference'"
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a CUDA build of torch, or take backend 'cpu'"
    if reason := refusal()[0]:
        return f"torch cannot use the GPU here: {reason}; update the driver, or take backend 'cpu'"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: no NVIDIA GPU or driver here; see nvidia-smi, or take backend 'cpu'"
    device = torch.cuda.current_device() if device is None else device
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and the "
            f"kernels need {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} (Ampere) or newer; take backend 'chunked'"
        )
    return None
