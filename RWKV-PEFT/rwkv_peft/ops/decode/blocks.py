"""Matrices in blocks: 32 weights along a row share a scale, and are integers of 8 or 4 bits."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32  # weights that share a scale
PANEL = 16  # rows that stand side by side
BITS = (8, 4)
BAND = 1 << 22  # weights that are packed or unpacked at a time, because they are larger meanwhile


class Blocks(NamedTuple):
    """A matrix (out, in) in the layout of cpu/decode/blocks.h and cuda/decode; the last panel is padded with zeros.

    words (panels, in / 32, bits * 16 + 8) int32 are a panel's blocks: its `integers`, then its `scales`.
    """

    bits: int
    out_features: int
    words: Tensor

    @classmethod
    def zeros(cls, bits: int, out_features: int, in_features: int, device: torch.device) -> "Blocks":
        """Blocks of memory that is to be filled."""
        shape = -(-out_features // PANEL), in_features // BLOCK, bits * PANEL + PANEL // 2
        return cls(bits, out_features, torch.zeros(shape, dtype=torch.int32, device=device))

    @property
    def integers(self) -> Tensor:
        """(panels, in / 32, bits, 16) int32: a panel's 32 columns, 32 / bits of each row in a word, without a sign:
        1 << (bits - 1) more than they are. Its first four columns are the word's bytes, or their lower halves, and the
        next four the upper ones."""
        return self.words[..., : self.bits * PANEL].unflatten(2, (self.bits, PANEL))

    @property
    def scales(self) -> Tensor:
        """(panels, in / 32, 16) bfloat16."""
        return self.words[..., self.bits * PANEL :].view(torch.bfloat16)

    @property
    def in_features(self) -> int:
        return self.words.shape[1] * BLOCK

    @property
    def nbytes(self) -> int:
        return self.words.nbytes

    def bands(self, size: int) -> Iterator["Blocks"]:
        """Parts of some rows, of about `size` weights each."""
        step = max(size // (PANEL * self.in_features), 1)
        for i, words in enumerate(self.words.split(step)):
            yield Blocks(self.bits, min(self.out_features - i * step * PANEL, len(words) * PANEL), words)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix that the blocks stand for: (out, in)."""
        return torch.cat([band._rows().to(dtype) for band in self.bands(BAND)])

    def _rows(self) -> Tensor:
        """The same in float32, of one band."""
        integers = (self.integers[:, :, :, None] >> places(self.bits, self.words.device)) & ((1 << self.bits) - 1)
        values = (integers.flatten(2, 3) - (1 << (self.bits - 1))) * self.scales[:, :, None].float()
        return values.permute(0, 3, 1, 2).reshape(-1, self.in_features)[: self.out_features]


def places(bits: int, device: torch.device) -> Tensor:
    """The lowest bit of each column of a word: (32 / bits, 1) int32."""
    columns = torch.arange(32 // bits, dtype=torch.int32, device=device)[:, None]
    return columns % 4 * 8 + columns // 4 * bits


def quantize(weight: Tensor, bits: int) -> Blocks:
    """Round a matrix (out, in), in a multiple of 32, to Blocks of `bits`.

    A block's scale first makes its largest weight the largest integer; with 4 bits it then becomes the one that fits
    those integers best, in least squares, and the weights are rounded anew.
    """
    out, width = weight.shape
    if bits not in BITS or width % BLOCK:
        raise ValueError(f"{bits} bits, {width} columns: blocks have 8 or 4 bits, and rows are whole blocks of {BLOCK}")
    blocks, done = Blocks.zeros(bits, out, width, weight.device), 0
    for band in blocks.bands(BAND):
        rows = weight[done : done + band.out_features].float()
        done += len(rows)
        missing = -len(rows) % PANEL
        rows = torch.cat([rows, rows.new_zeros(missing, width)]) if missing else rows
        integers, scales = _rounded(rows.view(-1, width // BLOCK, BLOCK), bits)
        _pack(integers.view(-1, PANEL, width // BLOCK, BLOCK), bits, band.integers)
        band.scales.copy_(scales.view(-1, PANEL, width // BLOCK).transpose(1, 2))
    return blocks


def _rounded(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Blocks (n, blocks, 32) float32 -> their integers, float32, and scales (n, blocks), bfloat16."""
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1

    def integers(scales: Tensor) -> Tensor:
        return (rows / scales.float()[..., None]).nan_to_num(0.0).round().clamp(lowest, highest)

    largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))[..., 0]
    scales = (largest / lowest).bfloat16()  # the lowest integer is one farther from 0 than the highest
    rounded = integers(scales)
    if bits == 4:
        scales = ((rows * rounded).sum(-1) / rounded.square().sum(-1).clamp_min(1)).bfloat16()
        rounded = integers(scales)
    return rounded, scales


def _pack(integers: Tensor, bits: int, words: Tensor) -> None:
    """Add integers (panels, 16, blocks, 32) to words (panels, blocks, bits, 16), which are zeros."""
    columns = integers.to(torch.int32).permute(0, 2, 3, 1).unflatten(2, (bits, 32 // bits)) + (1 << (bits - 1))
    words += (columns << places(bits, words.device)).sum(3, dtype=torch.int32)
