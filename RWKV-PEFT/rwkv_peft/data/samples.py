"""Samples: what a row of a batch holds, in an order that depends on the seed alone.

Sample n, for any n >= 0, is sample n % len of epoch n // len; each epoch visits every sample once,
in its own order. tokens is int64 (T + 1,): inputs are tokens[:-1], targets tokens[1:]; mask is bool
(T,): which targets count.
"""

from functools import lru_cache

import numpy as np
import torch

from ..errors import UserError
from .binidx import BinidxDataset
from .masks import make_mask
from .order import Permutation

DATALOADS = ("get", "pad", "only")
BUCKET, BLOCK = 512, 16


def build_samples(config, vocab_size):
    """DataConfig -> the samples it names, over tokens checked to be below the model's vocab_size.

    Raises UserError for files that are missing or damaged, ids outside the vocabulary, a ctx_len
    longer than the data, and settings that contradict each other.
    """
    check_config(config)
    dataset = BinidxDataset(config.path)
    dataset.check_vocab(vocab_size)
    mask = make_mask(dataset, config)
    if config.dataload == "get":
        return WindowSamples(dataset, config.ctx_len, config.seed, mask)
    return DocumentSamples(dataset, config.ctx_len, config.seed, mask, bucketed=config.dataload == "pad")


def check_config(config):
    """UserError for settings that do not go together."""
    if config.dataload not in DATALOADS:
        raise UserError(f"--dataload {config.dataload}: one of {', '.join(DATALOADS)}")
    if config.ctx_len < 1:
        raise UserError(f"--ctx_len {config.ctx_len}: at least 1")
    if config.dataload == "only" and config.micro_bsz != 1:
        raise UserError(f"--dataload only reads one document at a time: --micro_bsz {config.micro_bsz} must be 1; "
                        "--dataload pad batches documents of different lengths")
    if config.dataload == "get" and config.loss_mask == "pad":
        raise UserError("--loss_mask pad: --dataload get reads a stream, which has no padding; "
                        "take --loss_mask none, or --dataload pad")


class WindowSamples:
    """Dataload "get": windows of ctx_len + 1 tokens from the stream of all documents.

    Window i holds the targets i*ctx_len + 1 ... (i+1)*ctx_len, as RWKV-LM cuts them. Where the
    last window is short of targets it begins earlier, and those that the window before has
    counted are masked: an epoch counts every token of the data but the first exactly once.
    """

    def __init__(self, dataset, ctx_len, seed, mask=None):
        targets = len(dataset.tokens) - 1
        if targets < ctx_len:
            raise UserError(
                f"--ctx_len {ctx_len}: {dataset.bin_path} holds {targets + 1} tokens, and a window takes "
                f"ctx_len + 1; take --ctx_len {max(targets, 1)} or less, or --dataload pad")
        self.dataset, self.ctx_len, self.seed, self._mask = dataset, ctx_len, seed, mask
        self._size = -(-targets // ctx_len)
        self._overlap = self._size * ctx_len - targets  # targets that the last window must not count again
        self.notes = [f"{targets + 1} tokens, {self._size} windows of {ctx_len} an epoch"]
        if self._overlap:
            self.notes.append(f"the last window shares {self._overlap} targets with the one before; "
                              "they count once")
        self._order = lru_cache(maxsize=4)(lambda epoch: Permutation(self._size, seed, epoch))

    def __len__(self):
        return self._size

    def __getitem__(self, n):
        start, repeated = self._window(n)
        tokens = self.dataset.tokens[start: start + self.ctx_len + 1].astype(np.int64)
        return torch.from_numpy(tokens), torch.from_numpy(self._counted(start, repeated))

    def count(self, n):
        """How many targets of sample n count."""
        start, repeated = self._window(n)
        return self.ctx_len - repeated if self._mask is None else int(self._counted(start, repeated).sum())

    def _window(self, n):
        """Sample n -> the window's first token, and how many of its first targets are not its own."""
        epoch, position = divmod(n, self._size)
        index = self._order(epoch)[position]
        repeated = self._overlap if index == self._size - 1 else 0
        return index * self.ctx_len - repeated, repeated

    def _counted(self, start, repeated):
        if self._mask is None:
            counted = np.ones(self.ctx_len, dtype=bool)
        else:
            counted = self._mask(start + 1, start + self.ctx_len + 1)
        counted[:repeated] = False
        return counted


class DocumentSamples:
    """Dataloads "pad" and "only": one document a row, cut to ctx_len + 1 tokens.

    With bucketed=True documents of about one length come together: each 512 of the epoch's order
    are sorted by length, and runs of 16 of them shuffled.
    """

    def __init__(self, dataset, ctx_len, seed, mask=None, bucketed=False):
        self.dataset, self.ctx_len, self.seed, self._mask = dataset, ctx_len, seed, mask
        sizes = dataset.sizes
        self._documents = np.flatnonzero(sizes >= 2)
        if not len(self._documents):
            raise UserError(f"{dataset.idx_path}: every document has fewer than 2 tokens, nothing to predict")
        self.notes = [f"{len(self._documents)} documents an epoch"]
        if len(self._documents) < len(sizes):
            self.notes.append(f"{len(sizes) - len(self._documents)} documents of fewer than 2 tokens are left out")
        excess = sizes[sizes > ctx_len + 1].astype(np.int64) - (ctx_len + 1)
        if len(excess):
            self.notes.append(
                f"{len(excess)} documents are longer than --ctx_len {ctx_len} and are cut: {excess.sum()} of "
                f"{len(dataset.tokens)} tokens are not read; the longest needs --ctx_len {int(sizes.max()) - 1}")
        self._order = lru_cache(maxsize=4)(lambda epoch: Permutation(len(self._documents), seed, epoch))
        self._bucket = lru_cache(maxsize=8)(self._make_bucket) if bucketed else None

    def __len__(self):
        return len(self._documents)

    def __getitem__(self, n):
        start, size = self._document(n)
        tokens = self.dataset.tokens[start: start + size].astype(np.int64)
        return torch.from_numpy(tokens), torch.from_numpy(self._counted(start, size))

    def count(self, n):
        """How many targets of sample n count."""
        start, size = self._document(n)
        return size - 1 if self._mask is None else int(self._counted(start, size).sum())

    def _document(self, n):
        """Sample n -> where its document begins, and how many tokens of it are read."""
        epoch, position = divmod(n, len(self))
        if self._bucket is None:
            index = self._documents[self._order(epoch)[position]]
        else:
            index = self._bucket(epoch, position // BUCKET)[position % BUCKET]
        return self.dataset.start(index), min(int(self.dataset.sizes[index]), self.ctx_len + 1)

    def _make_bucket(self, epoch, number):
        """Documents at the positions [512 number, 512 number + 512) of an epoch, blocks of like length."""
        order = self._order(epoch)
        positions = range(number * BUCKET, min((number + 1) * BUCKET, len(self)))
        documents = self._documents[[order[position] for position in positions]]
        documents = documents[np.argsort(self.dataset.sizes[documents], kind="stable")]
        blocks = Permutation(-(-len(documents) // BLOCK), self.seed, epoch, number)
        return np.concatenate([documents[b * BLOCK: (b + 1) * BLOCK] for b in blocks])

    def _counted(self, start, size):
        return np.ones(size - 1, dtype=bool) if self._mask is None else self._mask(start + 1, start + size)
