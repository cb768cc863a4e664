"""Write and read the optimizer's state by parameter, so that a run may go on on other ranks, stages and devices.

optimizer/rank-NNNNN.safetensors holds the pieces of one rank, float32 (n,), each called KIND:START:PARAMETER: KIND is
master or the name of a moment, as exp_avg, and START the piece's first element in the flattened parameter. The header
counts the optimizer's steps. No rank waits for another, and a rank that reads takes its own pieces from the files of
all.

An optimizer whose state is not by parameter adds codes:RANK:NUMBER:NAME, of the NUMBERth flat tensor, for that rank.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from ...checkpoints.atomic import fsync
from ...checkpoints.tensors import TensorSpec, read_safetensors, write_safetensors
from ...cli.errors import UNREADABLE, UserError, short
from .partitions import Piece
from .run_state import MOST, OPTIMIZER, remedy_of

METADATA_KEY, FORMAT_VERSION = "rwkv_peft_optimizer", 1
STEPS = "steps"  # its entry in the metadata
CODES = "codes"
NO_CODES: Mapping[str, torch.Tensor] = MappingProxyType({})
SCALE = "loss_scale"  # an entry in the metadata
NO_SCALE: Mapping[str, float] = MappingProxyType({})


def write_pieces(
    checkpoint: Path,
    rank: int,
    pieces: Iterable[Piece],
    steps: int,
    codes: Mapping[str, torch.Tensor] = NO_CODES,
    scale: Mapping[str, float] = NO_SCALE,
) -> None:
    """Write a rank's pieces, its codes and the loss scale's counters into a checkpoint, a tensor at a time."""
    tensors = {f"{kind}:{piece.start}:{piece.name}": part for piece in pieces for kind, part in piece.tensors.items()}
    tensors |= {f"{CODES}:{rank}:{name}": tensor for name, tensor in codes.items()}
    told = {"format_version": FORMAT_VERSION, STEPS: steps} | ({SCALE: dict(scale)} if scale else {})
    path = checkpoint / OPTIMIZER / f"rank-{rank:05d}.safetensors"
    path.parent.mkdir(exist_ok=True)
    specs = {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}
    write_safetensors(path, specs, tensors.items(), {"format": "pt", METADATA_KEY: json.dumps(told)})
    fsync(path)  # by the machine that wrote it


class SavedOptimizer:
    """The optimizer's state in a checkpoint, of all ranks; its count of steps; the counters of the loss scale."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint, self.steps = checkpoint, 0
        self.scale: dict[str, float] = {}
        self.found: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = defaultdict(list)
        self.codes: dict[tuple[int, str], torch.Tensor] = {}
        for path in sorted((checkpoint / OPTIMIZER).glob("rank-*.safetensors")):
            tensors, header = read_safetensors(path, weights=False)
            try:
                told = json.loads(header[METADATA_KEY])
                version, self.steps = int(told["format_version"]), int(told[STEPS])
                self.scale = {name: number for name, number in told.get(SCALE, {}).items() if float(number) >= -1}
                if not 0 <= self.steps < MOST:
                    raise ValueError(f"{self.steps} is no number of steps")
                if version > FORMAT_VERSION:
                    raise ValueError(f"its format is {version}, and this version reads up to {FORMAT_VERSION}")
                for key, tensor in tensors.items():
                    kind, start, name = key.split(":", 2)
                    if kind == CODES:
                        self.codes[int(start), name] = tensor
                        continue
                    if tensor.dim() != 1 or tensor.dtype != torch.float32:
                        raise ValueError(f"{short(key)} is no row of float32")
                    self.found[kind, name].append((int(start), tensor))
            except UNREADABLE as error:
                raise self.mismatch(error, path) from error

    def mismatch(self, reason: object, path: Path | None = None) -> UserError:
        """The error that a file, or the folder of all, does not hold what is due."""
        return UserError(
            f"{path or self.checkpoint / OPTIMIZER} does not hold the optimizer's state of this run: {reason}; "
            + remedy_of(self.checkpoint)
        )

    @torch.no_grad()
    def fill_codes(self, rank: int, codes: Mapping[str, torch.Tensor]) -> None:
        """Copy a rank's codes into its tensors. Raises UserError if some are missing."""
        for name, into in codes.items():
            saved = self.codes.get((rank, name))
            if saved is None or (saved.shape, saved.dtype) != (into.shape, into.dtype):
                raise self.mismatch(f"{CODES}:{rank}:{name} is no {into.dtype} of shape {tuple(into.shape)}")
            into.copy_(saved)

    @torch.no_grad()
    def fill(self, piece: Piece) -> None:
        """Copy the values of a piece into its tensors. Raises UserError if some are missing."""
        for kind, into in piece.tensors.items():
            saved = sorted(self.found.get((kind, piece.name), ()), key=lambda part: part[0])
            size = max((start + len(tensor) for start, tensor in saved), default=0)
            if size != piece.size:
                raise self.mismatch(f"{kind} of {piece.name} has {size:,} elements, and {piece.size:,} are due")
            done = piece.start
            for start, tensor in saved:
                end = min(start + len(tensor), piece.start + len(into))
                if start <= done < end:
                    into[done - piece.start : end - piece.start] = tensor[done - start : end - start].to(into.device)
                    done = end
            if done != piece.start + len(into):
                raise self.mismatch(f"{kind} of {piece.name} lacks element {done:,}")
