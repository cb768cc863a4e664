"""Shows documents and samples as text, with marks around what counts in the loss."""

import os
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

import numpy as np

from ..cli.errors import visible
from .binidx import BinidxDataset
from .masks import undesirable
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .samples import Samples

Marks = tuple[str, str]  # the marks that open and close counted text
PLAIN, TERMINAL = ("[[", "]]"), ("\033[1;32m", "\033[0m")
END = "<end>"
LONG, RUNS = 1000, 20  # a piece of more characters loses its middle, and a document or sample of more pieces, too


def marks_for(stream: TextIO) -> Marks:
    """The Marks for a stream: bold and green on a terminal that has colours, unless NO_COLOR is set; else PLAIN."""
    colours = os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    return TERMINAL if stream.isatty() and colours else PLAIN


def show_documents(dataset: BinidxDataset, number: int, tokenizer: Tokenizer, marks: Marks = PLAIN) -> str:
    """The first `number` documents of a BinidxDataset, one below the other."""
    blocks: list[str] = []
    for index in range(min(number, len(dataset))):
        tokens = dataset[index]
        blocks.append(block(f"document {index + 1}", tokens, counted_in(dataset, index), tokenizer, marks))
    return "\n".join(blocks)


def counted_in(dataset: BinidxDataset, index: int) -> np.ndarray:
    """Tell which tokens of a document count in the loss: (n,), bool."""
    start, size = dataset.start(index), int(dataset.sizes[index])
    if dataset.mask is None:
        return np.ones(size, dtype=bool)
    return np.asarray(dataset.mask[start : start + size] != 0)


def show_samples(samples: "Samples", number: int, tokenizer: Tokenizer, marks: Marks = PLAIN) -> str:
    """The first `number` samples of a run, in the order in which it reads them."""
    blocks = []
    for n in range(min(number, len(samples))):
        sample = samples[n]
        rows = sample if isinstance(sample, list) else [sample]
        for part, (tokens, mask) in enumerate(rows, start=1):
            title = f"sample {n + 1}" + (f", document {part}" if len(rows) > 1 else "")
            title += ", undesirable" if undesirable(mask) else ""
            counted = np.concatenate([[False], mask.numpy() != 0])  # nothing predicts the first token
            blocks.append(block(title, tokens.numpy(), counted, tokenizer, marks))
    return "\n".join(blocks)


def block(title: str, tokens: np.ndarray, counted: np.ndarray, tokenizer: Tokenizer, marks: Marks) -> str:
    """A heading, and tokens (n,) as text; counted (n,) tells which of them count."""
    heading = f"== {title}: {len(tokens)} tokens, {int(counted.sum())} count"
    return f"{heading}\n{render(tokens, counted, tokenizer, marks)}"


def render(tokens: np.ndarray, counted: np.ndarray, tokenizer: Tokenizer, marks: Marks) -> str:
    """The text of tokens, with marks around what counts and <end> for the end token, shortened if it is long."""
    parts = [f"{marks[0]}{text}{marks[1]}" if counts else text for text, counts in pieces(tokens, counted, tokenizer)]
    return "".join(parts)


def pieces(tokens: np.ndarray, counted: np.ndarray, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of tokens as [(text, counts)]; long pieces, and long lists of them, lose their middle and say so."""
    found = [
        (shortened(plain_text([token for token, _ in run], tokenizer)), bool(counts))
        for counts, run in groupby(zip(tokens.tolist(), counted.tolist()), key=lambda pair: pair[1])
    ]
    if len(found) > RUNS:
        found[RUNS // 2 : -(RUNS // 2)] = [(f"\n… {len(found) - RUNS:,} pieces are not shown …\n", False)]
    return found


def shortened(text: str) -> str:
    """A text, without its middle if it is longer than LONG."""
    if len(text) <= LONG:
        return text
    half = LONG // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters are not shown …\n{text[-half:]}"


def plain_text(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of a list of tokens, with END for the tokenizer's end token, and other special tokens by their names."""
    names = {number: name for name, number in tokenizer.special.items()}
    runs = groupby(tokens, key=lambda token: END if token == tokenizer.end_id else names.get(token, ""))
    return "".join(name * len(list(run)) if name else visible(tokenizer.decode(list(run))) for name, run in runs)
