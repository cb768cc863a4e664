"""The optimizer's state by parameter: a run may go on on other ranks, stages and devices.

ZeRO lays parameters one behind the other into flat tensors and gives each rank a part of every one: a part of all of
them together in stages 1 and 2, a part of each parameter in stage 3. A state that is kept by parameter fits any of
these and any number of ranks.

optimizer/rank-NNNNN.safetensors holds the pieces of one rank, float32 (n,), each called KIND:START:PARAMETER: KIND is
master, first (what the master began as) or the name of a moment, as exp_avg, and START the piece's first element in the
flattened parameter. The header counts the optimizer's steps. No rank waits for another. A rank that reads takes its own
pieces from the files of all.

An optimizer with other state than by parameter adds codes:RANK:NUMBER:NAME, of the NUMBERth flat tensor, for that rank.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from ...checkpoints.atomic import fsync
from ...checkpoints.readable import reading
from ...checkpoints.tensors import TensorSpec, read_safetensors, write_safetensors
from ...cli.errors import UserError
from .checkpoints import OPTIMIZER, remedy_of

MASTER, FIRST = "master", "first"  # the float32 weight, and what it was at the run's start if that is kept
KINDS = (MASTER, "exp_avg", "exp_avg_sq")  # and Adam's two moments of it
METADATA_KEY, FORMAT_VERSION = "rwkv_peft_optimizer", 1
STEPS, SCALE = "steps", "loss_scale"  # entries in the metadata
CODES = "codes"
NO_CODES: Mapping[str, torch.Tensor] = MappingProxyType({})
NO_SCALE: Mapping[str, float] = MappingProxyType({})


class Fragment(NamedTuple):
    """The elements from `start` on of a flattened parameter of `size` elements: {kind: float32 (n,)}, views of the
    engine's master and of the optimizer's moments."""

    name: str
    size: int
    start: int
    tensors: Mapping[str, torch.Tensor]


def write_pieces(
    checkpoint: Path,
    rank: int,
    pieces: Iterable[Fragment],
    steps: int,
    codes: Mapping[str, torch.Tensor] = NO_CODES,
    scale: Mapping[str, float] = NO_SCALE,
) -> None:
    """Write a rank's pieces, its codes and the loss scale's counters into a checkpoint, a tensor at a time."""
    tensors = {f"{kind}:{piece.start}:{piece.name}": part for piece in pieces for kind, part in piece.tensors.items()}
    tensors |= {f"{CODES}:{rank}:{name}": tensor for name, tensor in codes.items()}
    header = {"format_version": FORMAT_VERSION, STEPS: steps} | ({SCALE: dict(scale)} if scale else {})
    path = checkpoint / OPTIMIZER / f"rank-{rank:05d}.safetensors"
    path.parent.mkdir(exist_ok=True)
    specs = {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}
    write_safetensors(path, specs, tensors.items(), {"format": "pt", METADATA_KEY: json.dumps(header)})
    fsync(path)  # by the machine that wrote it


class SavedOptimizer:
    """The optimizer's state in a checkpoint, of all ranks; its count of steps; the counters of the loss scale."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint, self.steps = checkpoint, 0
        self.scale: dict[str, float] = {}
        self.pieces: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = defaultdict(list)
        self.codes: dict[tuple[int, str], torch.Tensor] = {}
        for path in sorted((checkpoint / OPTIMIZER).glob("rank-*.safetensors")):
            tensors, metadata = read_safetensors(path, weights=False)
            with reading(path, "does not hold the optimizer's state of this run", remedy_of(checkpoint)):
                header = json.loads(metadata[METADATA_KEY])
                if header["format_version"] > FORMAT_VERSION:
                    raise ValueError(f"its format is {header['format_version']}, and {FORMAT_VERSION} is read here")
                self.steps, self.scale = header[STEPS], header.get(SCALE, {})
                for key, tensor in tensors.items():
                    kind, start, name = key.split(":", 2)
                    if kind == CODES:
                        self.codes[int(start), name] = tensor
                    else:
                        self.pieces[kind, name].append((int(start), tensor))

    @torch.no_grad()
    def fill_codes(self, rank: int, codes: Mapping[str, torch.Tensor]) -> None:
        """Copy a rank's codes into its tensors. Raises UserError if some are missing."""
        for name, into in codes.items():
            saved = self.codes.get((rank, name))
            if saved is None or (saved.shape, saved.dtype) != (into.shape, into.dtype):
                raise self.mismatch(f"{CODES}:{rank}:{name} is no {into.dtype} of shape {tuple(into.shape)}")
            into.copy_(saved)

    @torch.no_grad()
    def fill(self, piece: Fragment) -> None:
        """Copy the values of a piece into its tensors. Raises UserError if some are missing."""
        for kind, into in piece.tensors.items():
            done, end_of_piece = piece.start, piece.start + len(into)
            for start, tensor in sorted(self.pieces.get((kind, piece.name), ()), key=lambda part: part[0]):
                end = min(start + len(tensor), end_of_piece)
                # Pieces of another number of ranks may begin within this one, end behind it, or be empty.
                if start <= done < end:
                    into[done - piece.start : end - piece.start] = tensor[done - start : end - start].to(into.device)
                    done = end
            if done != end_of_piece:
                raise self.mismatch(f"{kind} of {piece.name} lacks element {done:,}")

    def mismatch(self, reason: str) -> UserError:
        """The error that the folder lacks a part of the state."""
        return UserError(
            f"{self.checkpoint / OPTIMIZER} does not hold the optimizer's state of this run: {reason}; "
            + remedy_of(self.checkpoint)
        )
