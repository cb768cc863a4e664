"""Quantized frozen weights through bitsandbytes, an optional package: NF4 (4.5 bits a weight) and
blockwise int8 (8.1 bits), on CPU and GPU.

A product dequantizes a few rows at a time and drops them, so that training's memory is the quantized weight plus
activations.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..cli.errors import UserError
from ..ops.native.calls import constant_when_compiled
from ..ops.products import addmm_

ROW_ELEMENTS = 1 << 22  # dequantized elements held at a time
GPU_ROW_ELEMENTS = 1 << 26  # on a GPU, which many small products leave idle: all of a 7B model's largest matrix


def block_size(kind: str) -> int:
    """Weights that share one scale."""
    return 64 if kind == "nf4" else 256


def row_unit(kind: str, columns: int) -> int:
    """The multiple of rows at which bands of a weight with so many columns begin: no block of weights is split."""
    return 1 if kind == "none" else block_size(kind) // math.gcd(block_size(kind), columns)


def on_gpu(x: Tensor) -> bool:
    """True if x is on a GPU, or has no data, by which a GPU's memory is planned."""
    return not x.is_cpu


def quantize(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """weight (out, in), any float dtype -> packed (uint8, 1-D), scales (int32, 1-D).

    The scales are float32 seen as int32, so that casting a module (`model.bfloat16()`) leaves them alone. A GPU and a
    CPU may choose different levels for a weight that lies midway between two, to float32's rounding.
    """
    functional = _bitsandbytes()
    flat = weight.contiguous().float()
    if kind == "nf4":
        packed, state = functional.quantize_4bit(flat, quant_type="nf4", blocksize=block_size(kind))
    else:
        packed, state = functional.quantize_blockwise(flat, blocksize=block_size(kind))
    return packed.flatten(), state.absmax.float().view(torch.int32)


def roundtrip(weight: Tensor, kind: str) -> Tensor:
    """The weight (out, in) after quantization, in float32."""
    packed, scales = quantize(weight, kind)
    return QuantizedProduct(kind, weight.shape, scales).rows(packed, slice(0, weight.shape[0]), torch.float32)


class QuantizedProduct:
    """Products with a quantized weight; see product.py for the interface."""

    def __init__(self, kind: str, shape: Sequence[int], scales: Tensor) -> None:
        """kind "nf4" or "int8"; shape (out, in); scales as `quantize` gives them."""
        self.kind = kind
        self.out_features, self.in_features = shape
        self.scales = scales

    def shape(self, packed: Tensor) -> tuple[int, int]:
        return self.out_features, self.in_features

    def rows(self, packed: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        start, stop = rows.start * self.in_features, rows.stop * self.in_features
        size = block_size(self.kind)
        first = start // size * size  # a block that begins in an earlier row is read whole
        flat = self._dequantize(packed, first, stop, dtype)
        return flat[start - first :].view(-1, self.in_features)

    def forward(self, z: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
        y = z.new_empty(z.shape[0], self.out_features)
        for rows in self._row_chunks(z):
            addmm_(y[:, rows], z, self.rows(packed, rows, z.dtype).t(), beta=0)
        return y if bias is None else y.add_(bias.to(y.dtype))

    def backward(self, g: Tensor, packed: Tensor) -> Tensor:
        dz = g.new_zeros(g.shape[0], self.in_features)
        self.add_backward_(dz, g, packed)
        return dz

    def add_forward_(self, y: Tensor, z: Tensor, packed: Tensor, bias: Tensor | None = None) -> None:
        if bias is not None:
            y += bias
        for rows in self._row_chunks(y):
            addmm_(y[:, rows], z, self.rows(packed, rows, z.dtype).t())

    def add_backward_(self, dz: Tensor, g: Tensor, packed: Tensor) -> None:
        chunks = list(self._row_chunks(dz))
        if len(chunks) == 1 or not on_gpu(dz):
            for rows in chunks:
                addmm_(dz, g[:, rows], self.rows(packed, rows, g.dtype))
            return
        total = dz.to(torch.promote_types(dz.dtype, torch.float32))  # so that dz is rounded once
        for rows in chunks:
            total += g[:, rows] @ self.rows(packed, rows, g.dtype)
        dz.copy_(total)

    def _row_chunks(self, like: Tensor) -> Iterator[slice]:
        step = max(1, (GPU_ROW_ELEMENTS if on_gpu(like) else ROW_ELEMENTS) // self.in_features)
        for start in range(0, self.out_features, step):
            yield slice(start, min(start + step, self.out_features))

    def _dequantize(self, packed: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Elements [start, stop) of the flattened weight; start is a multiple of the block size."""
        functional = _bitsandbytes()
        size = block_size(self.kind)
        absmax = self.scales[start // size : -(-stop // size)].view(torch.float32)
        # bitsandbytes computes in float32, float16 and bfloat16
        native = dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32
        if self.kind == "nf4":
            state = functional.QuantState(
                absmax, shape=(1, stop - start), blocksize=size, quant_type="nf4", dtype=native
            )
            part = packed[start // 2 : -(-stop // 2)]
            return functional.dequantize_4bit(part[:, None], state).flatten().to(dtype)
        state = functional.QuantState(absmax, code=_int8_code(packed.device), blocksize=size, dtype=native)
        return functional.dequantize_blockwise(packed[start:stop], state).flatten().to(dtype)


@constant_when_compiled  # torch.compile can neither trace how the code is made nor keep it
def _int8_code(device: torch.device) -> Tensor:
    """The 256 values that an int8 weight can have, float32, on a device."""
    return _make_int8_code(device)


@functools.cache
def _make_int8_code(device: torch.device) -> Tensor:
    return _bitsandbytes().create_dynamic_map().to(device)


def _bitsandbytes() -> ModuleType:
    try:
        from bitsandbytes import functional
    except (ImportError, RuntimeError, OSError) as error:  # the last two where its library does not load
        raise UserError(
            f"--quant needs bitsandbytes, which does not import here ({error}); "
            "pip install bitsandbytes, or use --quant none"
        ) from error
    return functional
