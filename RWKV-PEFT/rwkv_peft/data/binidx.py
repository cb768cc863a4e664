"""Token files in the MMIDIDX v1 format of RWKV-LM and Megatron: PREFIX.bin and PREFIX.idx.

.bin holds the documents' tokens one after the other. .idx holds, little-endian: the magic
"MMIDIDX\\0\\0", version (u64, 1), the token type's code (u8), the number of documents n (u64), the
number of boundaries m (u64), n sizes (i32, in tokens), n pointers (i64, in bytes into .bin), and m
boundaries (i64; Megatron groups sentences with them, and we read documents one by one as RWKV-LM
does). An optional PREFIX.mask holds a byte a token: 1 if the token counts in the loss, 2 if it counts
in an answer labelled undesirable. An optional PREFIX.weights holds the weight of each document in the loss (f32).
"""

import os
import struct
from bisect import bisect_right
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import DTypeLike

from ..checkpoints.digest import digest_of
from ..checkpoints.readable import choice_in, object_in, require_readable
from ..cli.errors import UserError
from .recorded import ENDINGS, binidx_prefix, record_path
from .rows import ENDINGS as ROWS

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
REMEDY = "make it again with rwkv-peft preprocess"
CHUNK = 1 << 22
UNDESIRABLE = 2  # in a .mask
# the numpy type of each .idx token code: integers only, little-endian
TOKEN_TYPES = MappingProxyType({1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"})


def dtype_code(vocab_size: int) -> int:
    """The token code for a vocabulary: uint16 (8) if it fits, else int32 (4)."""
    return 8 if vocab_size <= 65536 else 4


def map_file(path: str | Path, dtype: DTypeLike) -> np.ndarray:
    """Map a file as a read-only 1-D array; it is a plain one because slices of np.memmap cost more."""
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def counting(stored: np.ndarray) -> int:
    """The number of tokens that a .mask counts."""
    return sum(int(np.count_nonzero(stored[i : i + CHUNK])) for i in range(0, len(stored), CHUNK))


class BinidxDataset:
    """A .bin/.idx pair, memory-mapped and validated when opened.

    len(dataset) documents; dataset[i] is document i's tokens; tokens (all documents, 1-D), mask (uint8 by
    token, or None) and weights (float32 by document, or None: all 1) are memory maps; sizes (n,) int32
    and pointers (n,) int64 come from the index. Raises UserError for files that are missing, truncated, or disagree.
    """

    def __init__(self, path: str | Path) -> None:
        self.prefix = binidx_prefix(path)
        self.bin_path, self.idx_path, self.mask_path, self.weights_path = (self.prefix + end for end in ENDINGS)
        self._read_index()
        self._map_tokens()
        self.mask = self._companion(self.mask_path, np.uint8, len(self.tokens), "mask has a byte for each token")
        due = "weight of 4 bytes is due for each document"
        self.weights = self._companion(self.weights_path, "<f4", len(self), due)
        if self.weights is not None and not (np.isfinite(self.weights) & (self.weights >= 0)).all():
            raise UserError(f"{self.weights_path}: holds a weight that is negative or no number; {REMEDY}")

    def digest(self, with_mask: bool) -> str:
        """The digests of the files, with the mask's if that counts, one behind the other."""
        paths = [self.bin_path, self.idx_path, *([self.mask_path] if with_mask and self.mask is not None else [])]
        return "".join(map(digest_of, [*paths, *([] if self.weights is None else [self.weights_path])]))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> np.ndarray:
        start = self.start(index)
        return self.tokens[start : start + int(self.sizes[index])]

    def start(self, index: int) -> int:
        """The position in `tokens` at which document `index` begins."""
        return int(self.pointers[index]) // self.dtype.itemsize

    def document_at(self, position: int) -> int:
        """The document that holds the token at `position`."""
        # numpy's search would copy all pointers first, because they are not aligned to eight bytes in the file
        return bisect_right(self.pointers, position * self.dtype.itemsize) - 1

    def check_vocab(self, vocab_size: int) -> None:
        """Raise UserError if a token is no id below vocab_size; read .bin once unless its dtype rules that out."""
        if self.dtype.kind == "u" and np.iinfo(self.dtype).max < vocab_size:
            return
        for start in range(0, len(self.tokens), CHUNK):
            chunk = self.tokens[start : start + CHUNK]
            if int(chunk.max()) < vocab_size and int(chunk.min()) >= 0:
                continue
            offset = int(np.flatnonzero((chunk >= vocab_size) | (chunk < 0))[0])
            position = start + offset
            raise UserError(
                f"{self.bin_path}: token {int(chunk[offset])} at position {position} (document "
                f"{self.document_at(position)}) is outside the model's vocabulary of {vocab_size}; "
                "tokenize the text with the model's own tokenizer, or take a model with a larger vocabulary"
            )

    def _read_index(self) -> None:
        path = self.idx_path
        self._require_prefix()
        length = os.path.getsize(path)
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            raise UserError(
                f"{path}: {length} bytes, shorter than its {HEADER.size}-byte header; the file is truncated; {REMEDY}"
            )
        magic, version, code, count, boundaries = HEADER.unpack(header)
        if magic != MAGIC:
            raise UserError(f"{path}: it begins with {magic!r}, and an MMIDIDX index begins with {MAGIC!r}; {REMEDY}")
        if version != 1:
            raise UserError(f"{path}: version {version}; only version 1 is read; {REMEDY}")
        if code not in TOKEN_TYPES:
            raise UserError(f"{path}: dtype code {code}; integer tokens have code 1, 2, 3, 4, 5 or 8; {REMEDY}")
        self.dtype = np.dtype(TOKEN_TYPES[code])
        expected = HEADER.size + 12 * count + 8 * boundaries
        if length != expected:
            raise UserError(
                f"{path}: {length} bytes, but {count} documents (count) and {boundaries} boundaries "
                f"(doc_count) take {expected}; the file is truncated or damaged; {REMEDY}"
            )
        if count == 0:
            raise UserError(f"{path}: holds no document (count 0); {REMEDY}")
        raw = map_file(path, np.uint8)
        sizes_end, pointers_end = HEADER.size + 4 * count, HEADER.size + 12 * count
        self.sizes = raw[HEADER.size : sizes_end].view("<i4")
        self.pointers = raw[sizes_end:pointers_end].view("<i8")
        self._check_documents()

    def _require_prefix(self) -> None:
        """Raise UserError if there is no index, with a remedy if a folder or a file of rows is there."""
        if os.path.isdir(self.prefix) and not os.path.isfile(self.idx_path):
            pairs, rows = choice_in(self.prefix, ".idx"), choice_in(self.prefix, *ROWS) or "; give a text"
            none = f"; the folder holds no .idx{rows} to rwkv-peft preprocess, which makes them"
            due = "and the PREFIX of PREFIX.bin and PREFIX.idx is due"
            raise UserError(f"{self.prefix} is a folder, {due}{pairs or none}")
        if os.path.isfile(self.prefix) and not os.path.isfile(self.idx_path):
            raise UserError(
                f"{self.prefix} is a file of rows or text, and the PREFIX of PREFIX.bin and PREFIX.idx is due; "
                "tokenize it with rwkv-peft preprocess, or give --data_type sft, or pairs for rows of a chosen and a "
                "rejected answer"
            )
        if not os.path.exists(self.idx_path) and "shards" in object_in(record_path(self.prefix)):
            raise UserError(
                f"{self.prefix} is a set in shards, which version 0.3.0 was the last to read as one; give the "
                f"shards, each a set by itself: --data_file {self.prefix}-00001 {self.prefix}-00002 …"
            )
        missing = self.prefix if self.prefix.endswith(ROWS) else self.idx_path  # rows given in place of a PREFIX
        message = f"{missing}: no such file; a data set is a PREFIX.bin with its PREFIX.idx; {REMEDY}"
        require_readable(self.idx_path, message, again=True)

    def _check_documents(self) -> None:
        """Raise UserError unless documents lie one after the other: pointers are the running sum of the sizes."""
        expected = 0
        for start in range(0, len(self.sizes), CHUNK):
            sizes = self.sizes[start : start + CHUNK].astype(np.int64)
            if sizes.min() < 0:
                index = start + int(np.flatnonzero(sizes < 0)[0])
                raise UserError(f"{self.idx_path}: sizes[{index}] = {self.sizes[index]} is negative; {REMEDY}")
            ends = expected + np.cumsum(sizes * self.dtype.itemsize)
            begins = np.concatenate(([expected], ends[:-1]))
            wrong = np.flatnonzero(self.pointers[start : start + CHUNK] != begins)
            if len(wrong):
                index = int(wrong[0])
                raise UserError(
                    f"{self.idx_path}: pointers[{start + index}] = {self.pointers[start + index]}, and the "
                    f"documents before it end at byte {begins[index]}; the index is damaged; {REMEDY}"
                )
            expected = int(ends[-1])
        self._bytes = expected

    def _map_tokens(self) -> None:
        require_readable(self.bin_path, f"{self.bin_path}: no such file beside {self.idx_path}; {REMEDY}")
        length = os.path.getsize(self.bin_path)
        if length != self._bytes:
            raise UserError(
                f"{self.bin_path}: {length} bytes, but the sizes in {self.idx_path} add up to "
                f"{self._bytes} bytes of {self.dtype.name} tokens; the file is truncated or not "
                f"this index's; {REMEDY}"
            )
        if length == 0:
            raise UserError(f"{self.bin_path}: holds no token; {REMEDY}")
        self.tokens = map_file(self.bin_path, self.dtype)

    def _companion(self, path: str, dtype: DTypeLike, number: int, due: str) -> np.ndarray | None:
        """Map a further file of the set, None if there is none."""
        if not os.path.isfile(path):
            return None
        require_readable(path, f"{path}: no such file")
        if (length := os.path.getsize(path)) != number * np.dtype(dtype).itemsize:
            raise UserError(
                f"{path}: {length} bytes, but {self.bin_path} holds {len(self.tokens)} "
                f"tokens in {len(self)} documents, and a {due}; {REMEDY}, or remove the file"
            )
        return map_file(path, dtype)
