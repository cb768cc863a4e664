"""Stores what a teacher says of rows, its most probable tokens at each token that counts, so that a run needs no
teacher in memory.

The file is a .safetensors with, for R documents and their N tokens that count,

- keys int64 (R, 2): a hash of each document's tokens and of which of them count
- bounds int64 (R + 1,): where the tokens of each begin
- words int32 (N, k), logprobs float32 (N, k + 1): as in a Stored (objectives/divergence.py)

and in its metadata a Source. A document is found by its key, in whichever order, batch or packing it is read.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...checkpoints.digest import digest_of
from ...checkpoints.readable import require_file
from ...cli.errors import UNREADABLE, UserError, told
from ...cli.numeric import all_finite
from ...config import Objective
from ...data.batches import EvalBatches
from ...data.recorded import Vocabulary
from ...data.samples import Samples
from ...objectives.distill import Distill
from ...objectives.divergence import Stored
from .contexts import seen_by_teacher
from .steps import Batch

ENTRY = "rwkv_peft.teacher"  # in the metadata
TENSORS = ("bounds", "keys", "logprobs", "words")
ANEW = "write it anew with --store_teacher and the flags of this run"


class Source(NamedTuple):
    """Tells how a file was made: the teacher's file and fingerprint, the hash of the rows' tokenizer ("": unknown), the
    size of the vocabulary, the temperature, and the mean probability of what is not stored."""

    teacher: str
    fingerprint: str
    tokenizer: str
    vocab_size: int
    temperature: float
    left: float


class StoredTeacher:
    """The content of a file, mapped."""

    def __init__(self, path: str) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = str(require_file(path))
        try:
            with safe_open(path, framework="pt") as file:
                self.source = Source(**json.loads((file.metadata() or {})[ENTRY]))
                bounds, keys, self.logprobs, self.words = tensors = [file.get_tensor(name) for name in TENSORS]
            if not fit(self.source, *tensors):
                raise ValueError("what it holds does not fit together")
        except (SafetensorError, *UNREADABLE) as error:
            raise UserError(
                f"--teacher_logprobs {path} is no whole file of --store_teacher ({told(error)}); copy it, or {ANEW}"
            ) from error
        self.places = {key.tobytes(): slice(*pair) for key, pair in zip(keys.numpy(), bounds.unfold(0, 2, 1).tolist())}

    @cached_property
    def fingerprint(self) -> str:
        return digest_of(self.path)

    def __str__(self) -> str:
        return (
            f"{self.words.shape[1]} tokens at each place, stored in {self.path}, as {self.source.teacher} says them; "
            f"{self.source.left:.2%} of the probability is left"
        )

    def of(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Look up what the teacher says of a batch's tokens that count, as Distill reads it."""
        places = [self.places[key] for key, _ in documents_of(batch)]
        words, logprobs = (
            torch.cat([tensor[place] for place in places] or [tensor[:0]]) for tensor in (self.words, self.logprobs)
        )
        return {"stored_words": words, "stored_logprobs": logprobs}

    def check(self, objective: Distill, vocab_size: int) -> None:
        """Raise UserError if the file was made for another vocabulary, or at another temperature."""
        source = self.source
        if source.vocab_size != vocab_size:
            raise UserError(
                f"--teacher_logprobs {self.path} is of a vocabulary of {source.vocab_size:,} tokens, and the student's "
                f"has {vocab_size:,}; a teacher speaks of the same tokens: name another"
            )
        if source.temperature != objective.temperature:
            raise UserError(
                f"--distill_temperature {objective.temperature:g}: {self.path} holds probabilities at "
                f"{source.temperature:g}, because those of single tokens do not tell others; give that, or {ANEW}"
            )

    def require_rows(self, vocabulary: Vocabulary | None, found: Iterable[Samples]) -> None:
        """Raise UserError if the file was made of rows in another tokenizer's tokens, or lacks one of the samples."""
        if vocabulary is not None and self.source.tokenizer not in ("", vocabulary.hash):
            raise UserError(
                f"--teacher_logprobs {self.path} was made of rows in another tokenizer's tokens than {vocabulary}; "
                f"{ANEW}"
            )
        for samples in (part for each in found for part in each.parts):
            for number, batch in enumerate(EvalBatches(samples, 1)):
                if any(key not in self.places for key, _ in documents_of(batch)):
                    raise UserError(
                        f"--teacher_logprobs {self.path} says nothing of sample {number + 1:,} of {len(samples):,} of "
                        f"{samples.dataset.bin_path}: its tokens, or those that count, are others than when the file "
                        f"was written; {ANEW}, or give the first run's data and --ctx_len"
                    )


def fit(source: Source, bounds: torch.Tensor, keys: torch.Tensor, logprobs: torch.Tensor, words: torch.Tensor) -> bool:
    """Tell whether what a file holds is of the kinds that are written, and fits together."""
    kinds = Source.__annotations__.values()
    dtypes = (torch.int64, torch.int64, torch.float32, torch.int32)
    return (
        all(isinstance(value, (int, kind) if kind is float else kind) for value, kind in zip(source, kinds))
        and tuple(tensor.dtype for tensor in (bounds, keys, logprobs, words)) == dtypes
        and (bounds.dim(), words.dim()) == (1, 2)
        and words.numel() > 0
        and logprobs.shape == (len(words), words.shape[1] + 1)
        and keys.shape == (len(bounds) - 1, 2)
        and bounds[[0, -1]].tolist() == [0, len(words)]
        and bool((bounds.diff() > 0).all())
        and all_finite(logprobs)
        and 0 <= int(words.min()) <= int(words.max()) < source.vocab_size
    )


def open_stored(objective: Objective, vocab_size: int) -> StoredTeacher | None:
    """Open the file of a teacher's word that an objective names, None if it names none."""
    if not objective.stored:
        return None
    assert isinstance(objective, Distill)  # because others name none
    found = StoredTeacher(objective.stored)
    found.check(objective, vocab_size)
    return found


def documents_of(batch: Mapping[str, Any]) -> Iterator[tuple[bytes, slice]]:
    """Yield for each document of a batch (on the CPU) in which tokens count, as its teacher reads it: its key, and the
    place of these tokens among those of the batch. What follows the last of them does not change what is said."""
    seen = seen_by_teacher(batch)
    tokens, counted = seen["tokens"], seen["counted"]
    rows, length = tokens.shape
    bounds = seen["cu_seqlens"] if "cu_seqlens" in seen else torch.arange(0, rows * length + 1, length)
    ends = torch.searchsorted(counted, bounds).tolist()
    flat, counts = tokens.flatten().numpy(), counted.numpy()
    for begin, first, last in zip(bounds.tolist(), ends, ends[1:]):
        if first < last:
            own = counts[first:last]
            digest = hashlib.blake2b((own - begin).tobytes(), digest_size=16)
            digest.update(flat[begin : own[-1] + 1].tobytes())
            yield digest.digest(), slice(first, last)


def tensors_of(said: Mapping[bytes, Stored]) -> dict[str, torch.Tensor]:
    """The tensors of a file of what was said of documents, by their keys."""
    sizes = torch.tensor([0, *(len(each.words) for each in said.values())])
    words, logprobs = (torch.cat(parts) for parts in zip(*said.values()))
    keys = torch.frombuffer(bytearray(b"".join(said)), dtype=torch.int64).view(-1, 2)
    return {"bounds": sizes.cumsum(0), "keys": keys, "logprobs": logprobs, "words": words}


def write_stored(path: Path, said: Mapping[bytes, Stored], source: Source) -> None:
    """Write what was said of documents to a file; use atomic_write around it."""
    from safetensors.torch import save_file

    save_file(tensors_of(said), path, {ENTRY: json.dumps(source._asdict())})
