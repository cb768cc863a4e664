"""Write token files, whole or not at all; binidx.py has the format."""

import os
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from ..files.atomic import temporary_beside
from ..files.lock import Busy, hold
from .binidx import HEADER, MAGIC, TOKEN_TYPES, dtype_code
from .prefix import binidx_prefix


class BinidxWriter:
    """Writes PREFIX.bin, PREFIX.idx, PREFIX.mask if mask=True, PREFIX.weights, and PREFIX.json if its text is given as
    `record`; a context manager.

    The files appear, whole, when the block ends without an exception, the index last. Until then they are hidden
    temporary files in the same folder, which are removed if the block fails, or by the next writer there if the process
    was killed. A mask of ones is not kept, nor are weights of 1, because they say nothing. Raises UserError if another
    process is writing the same data set, and if the files cannot be written.
    """

    def __init__(
        self, path: str | Path, vocab_size: int = 65536, mask: bool = False, record: str | None = None
    ) -> None:
        self.prefix, self.record = binidx_prefix(path), record
        self.code = dtype_code(vocab_size)
        self.dtype = np.dtype(TOKEN_TYPES[self.code])
        self.with_mask = mask
        self._something_masked = False
        self.sizes, self.weights = array("i"), array("f")

    def __enter__(self) -> "BinidxWriter":
        wanted = {".bin": True, ".weights": True, ".mask": self.with_mask}
        wanted |= {".json": self.record is not None, ".idx": True}
        endings = [end for end, is_wanted in wanted.items() if is_wanted]
        with ExitStack() as stack:
            # the first temporary file makes the folder
            names = {end: stack.enter_context(temporary_beside(Path(self.prefix + end))) for end in endings}
            lock = Path(self.prefix).with_name(f".{Path(self.prefix).name}.lock")
            try:
                stack.enter_context(hold(lock))
            except Busy as error:
                raise UserError(
                    f"{self.prefix}: another process is writing it ({error}); wait, or give another name"
                ) from None
            self._files = {end: stack.enter_context(open(name, "wb")) for end, name in names.items()}
            if self.record is not None:
                self._files[".json"].write(self.record.encode())
            self._stack = stack.pop_all()
        return self

    def add(self, tokens: ArrayLike, mask: ArrayLike | None = None) -> None:
        """Append one document: token ids (n,), and its mask (n,) if the writer was made with mask=True."""
        tokens = np.asarray(tokens)
        info = np.iinfo(self.dtype)
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() <= info.max):
            raise UserError(
                f"document {len(self.sizes)}: token ids {tokens.min()}..{tokens.max()} do not fit "
                f"{self.dtype.name}; give the tokenizer's vocab_size to the writer"
            )
        self.add_documents(
            tokens.astype(self.dtype).tobytes(),
            [len(tokens)],
            None if mask is None else np.asarray(mask, dtype=np.uint8).tobytes(),
        )

    def add_documents(
        self,
        tokens: bytes,
        sizes: Sequence[int],
        mask: bytes | None = None,
        continues: bool = False,
        weights: Sequence[float] = (),
    ) -> None:
        """Append documents given as bytes: tokens in this writer's dtype, and a byte of mask a token; weights are those
        of the documents, (): 1 each.

        With continues=True the first of them continues the document before.
        """
        if (mask is not None) != self.with_mask:
            raise ValueError("a mask is due if, and only if, the writer was made with mask=True")
        if mask is not None and len(mask) * self.dtype.itemsize != len(tokens):
            raise ValueError(f"{len(mask)} mask bytes for {len(tokens) // self.dtype.itemsize} tokens")
        self._files[".bin"].write(tokens)
        if mask is not None:
            self._files[".mask"].write(mask)
            self._something_masked |= bool(mask.strip(b"\1"))
        try:
            if continues and self.sizes and sizes:
                self.sizes[-1] += sizes[0]
                sizes, weights = sizes[1:], weights[1:]
            self.sizes.extend(sizes)
            self.weights.extend(weights or [1.0] * len(sizes))
        except OverflowError:
            raise UserError(
                f"document {len(self.sizes) - 1} has more than 2147483647 tokens, the most that "
                "the format holds; split the text into documents"
            ) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is not None:
            return self._stack.__exit__(kind, error, trace)
        with self._stack:  # turns failures to write into UserErrors
            self._finish()
        return False

    def _finish(self) -> None:
        """Give the files their names. The old index is removed first and the new one comes last, so that a kill in
        between leaves a set that is refused, not one that mixes old and new."""
        self._write_index(self._files[".idx"])
        weights = np.frombuffer(self.weights, dtype=np.float32)
        self._files[".weights"].write(weights.astype("<f4").tobytes())
        said = {".mask": self._something_masked, ".weights": bool((weights != 1).any())}
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        for end in (".idx", *(end for end, says in said.items() if not says)):  # an old mask would not fit these tokens
            Path(self.prefix + end).unlink(missing_ok=True)
        for end, file in self._files.items():
            if said.get(end, True):
                os.replace(file.name, self.prefix + end)

    def _write_index(self, file: BinaryIO) -> None:
        count = len(self.sizes)
        sizes = np.frombuffer(self.sizes, dtype=np.int32) if count else np.zeros(0, np.int32)
        ends = np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize
        pointers = np.concatenate((np.zeros(1, np.int64), ends[:-1])) if count else ends
        file.write(HEADER.pack(MAGIC, 1, self.code, count, count + 1))
        file.write(sizes.astype("<i4").tobytes())
        file.write(pointers.astype("<i8").tobytes())
        file.write(np.arange(count + 1, dtype="<i8").tobytes())
