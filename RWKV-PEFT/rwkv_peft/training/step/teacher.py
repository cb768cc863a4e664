"""The teacher of a run: another model, frozen, whole on every device; or its stored log-probabilities of the rows.

--store_teacher writes a .safetensors, so that a run needs no teacher in memory. It has, for R documents and their N
tokens that count,

- keys int64 (R, 2): a hash of each document's tokens and of their mask
- bounds int64 (R + 1,): the position at which the tokens of each begin
- words int32 (N, k), logprobs float32 (N, k + 1): as in Stored (objectives/divergence.py)

and in its metadata a Source. A document is found by its key, in whichever order, batch or packing it is read.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...checkpoints.base import Base, open_base
from ...checkpoints.digest import digest_of
from ...checkpoints.readable import reading, require_file
from ...checkpoints.tensors import DTYPES
from ...cli.errors import UserError
from ...cli.names import all_finite
from ...config import Objective, RunConfig
from ...data.batches import EvalBatches
from ...data.recorded import Vocabulary, recorded_beside
from ...data.samples import Samples
from ...models.layout import state_parts
from ...models.parts import LanguageModel
from ...models.state import State, split_time_states, state_of
from ...objectives.distill import Distill
from ...objectives.divergence import Stored
from .shared_prefix import teacher_batch

ENTRY = "rwkv_peft.teacher"  # in the metadata
TENSORS = ("bounds", "keys", "logprobs", "words")
ANEW = "write it anew with --store_teacher and the flags of this run"


def open_teacher(objective: Objective, vocab_size: int) -> Base | None:
    """Open an objective's teacher, None if it names none. Raises UserError as opening does, and for another vocabulary
    than the student's."""
    if not objective.teacher:
        return None
    teacher = open_base(objective.teacher)
    if teacher.config.vocab_size != vocab_size:
        raise UserError(
            f"--teacher_model {teacher.path} has a vocabulary of {teacher.config.vocab_size:,} tokens, and its student "
            f"{vocab_size:,}; a teacher speaks of the same tokens: name another"
        )
    return teacher


def require_own_tokens(teacher: Base, data: Vocabulary | None) -> None:
    """Raise UserError if the teacher was trained with another tokenizer than the data's, by the run recorded beside
    it."""
    own = recorded_beside(teacher.path)
    if own is not None and data is not None and own.hash != data.hash:
        raise UserError(
            f"--teacher_model {teacher.path} was trained with {own}, and the data was made with {data}, so that one "
            "number is another text to it; name a teacher of the data's tokenizer"
        )


def make_teacher(base: Base, config: RunConfig, device: torch.device) -> LanguageModel:
    """The frozen model of a teacher in the run's precision; rows begin with the time states of its file, if any."""
    model: LanguageModel = base.family.load(base.tensors, base.config).requires_grad_(False)
    model.settle()
    model.to(DTYPES[config.train.precision])
    states = split_time_states(base.tensors)[1]
    if states:
        zeros = State.zeros(base.config, 1)
        start = state_of(states, zeros, base.family.rows_are_keys, base.path)
        model.tune_states(start, state_parts(states))
    model.requires_grad_(False).eval().to(device)
    return model


class Source(NamedTuple):
    """How a file was made: the teacher's file and fingerprint, the hash of the rows' tokenizer ("": unknown), the
    size of the vocabulary, the temperature, and the mean probability of all tokens that are not stored."""

    teacher: str
    fingerprint: str
    tokenizer: str
    vocab_size: int
    temperature: float
    left: float


class StoredTeacher:
    """The content of a file of --store_teacher."""

    def __init__(self, path: str) -> None:
        from safetensors import safe_open

        self.path = path
        require_file(path)
        with reading(path, "is no whole file of --store_teacher", f"copy it, or {ANEW}"):
            with safe_open(path, framework="pt") as file:
                self.source = Source(**json.loads((file.metadata() or {})[ENTRY]))
                bounds, keys, self.logprobs, self.words = tensors = [file.get_tensor(name) for name in TENSORS]
            if not agree(self.source, *tensors):
                raise ValueError("its tensors do not fit together")
        self.places = {key.tobytes(): slice(*pair) for key, pair in zip(keys.numpy(), bounds.unfold(0, 2, 1).tolist())}

    @cached_property
    def fingerprint(self) -> str:
        return digest_of(self.path)

    def __str__(self) -> str:
        return (
            f"{self.words.shape[1]} tokens at each place, stored in {self.path}, as {self.source.teacher} says them; "
            f"{self.source.left:.2%} of the probability is left"
        )

    def lookup(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The stored tokens and log-probabilities at a batch's tokens that count, as Distill reads them."""
        places = [self.places[key] for key, _ in documents_of(batch)]
        words, logprobs = (
            torch.cat([tensor[place] for place in places] or [tensor[:0]]) for tensor in (self.words, self.logprobs)
        )
        return {"stored_words": words, "stored_logprobs": logprobs}

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


def agree(
    source: Source, bounds: torch.Tensor, keys: torch.Tensor, logprobs: torch.Tensor, words: torch.Tensor
) -> bool:
    """True if the entries of a file have the kinds, shapes and values with which it is written."""
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
    """Open an objective's file of --store_teacher, None if it names none.

    Raises UserError if the file was made for another vocabulary, or at another temperature.
    """
    if not objective.stored:
        return None
    assert isinstance(objective, Distill)  # because others name none
    found = StoredTeacher(objective.stored)
    source = found.source
    if source.vocab_size != vocab_size:
        raise UserError(
            f"--teacher_logprobs {found.path} is of a vocabulary of {source.vocab_size:,} tokens, and the student's "
            f"has {vocab_size:,}; a teacher speaks of the same tokens: name another"
        )
    if source.temperature != objective.temperature:
        raise UserError(
            f"--distill_temperature {objective.temperature:g}: {found.path} holds probabilities at "
            f"{source.temperature:g}, because those of single tokens do not tell others; give that, or {ANEW}"
        )
    return found


def documents_of(batch: Mapping[str, Any]) -> Iterator[tuple[bytes, slice]]:
    """Yield (key, place of its counted tokens among the batch's) of each document of a batch on the CPU.

    Documents are as the teacher reads them. Those in which nothing counts are left out, and tokens behind the last
    counted one do not change a key.
    """
    seen = teacher_batch(batch)
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


def write_stored(path: Path, stored: Mapping[bytes, Stored], source: Source) -> None:
    """Write a teacher's log-probabilities of documents, by their keys, to a file; use atomic_write around it."""
    from safetensors.torch import save_file

    sizes = torch.tensor([0, *(len(each.words) for each in stored.values())])
    words, logprobs = (torch.cat(parts) for parts in zip(*stored.values()))
    keys = torch.frombuffer(bytearray(b"".join(stored)), dtype=torch.int64).view(-1, 2)
    tensors = {"bounds": sizes.cumsum(0), "keys": keys, "logprobs": logprobs, "words": words}
    save_file(tensors, path, {ENTRY: json.dumps(source._asdict())})
