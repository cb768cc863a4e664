"""Describes a data set, and the training settings that fit it, as text."""

import numpy as np

from ..cli import counted
from .binidx import BinidxDataset, counting
from .encoding import Encoded
from .order import magic_prime


def describe(dataset: BinidxDataset, totals: Encoded | None = None) -> str:
    """Describe a BinidxDataset in several lines; totals (an Encoded) are preprocess's counts of its rows."""
    sizes, tokens = np.asarray(dataset.sizes), len(dataset.tokens)
    documents = counted(len(sizes), "document")
    lines = [f"{dataset.prefix}: {documents}, {tokens:,} tokens ({dataset.dtype.name})"]
    if dataset.mask is not None:
        lines.append(f"{counting(dataset.mask):,} tokens count in the loss ({dataset.mask_path}, which training reads)")
    if dataset.weights is not None:
        lines.append(f"rows weigh {dataset.weights.min():g} to {dataset.weights.max():g} ({dataset.weights_path})")
    if totals is not None:
        lines += laid_out(totals) + left_out(totals)
    lines += histogram(sizes) + suggestions(sizes, tokens, dataset.mask is not None)
    return "\n".join(lines)


def laid_out(totals: Encoded) -> list[str]:
    """The lines on rows with thinking and without, if thinking was asked for, and notes on rows that may be
    mistakes."""
    lines, counts = [], totals.counts
    if counts["thinking"]:
        lines.append(
            f"{counted(counts['thinking'], 'row')} with thinking, {counts['at_once']:,} without (<think></think)"
        )
    for count, what in (
        *(
            (number, f"with a field {name.split()[1]!r}, which is not read; preprocess --template lays it out")
            for name, number in counts.items()
            if name.startswith("unread ")
        ),
        (counts["wordless"], "with an empty answer, which teaches the model to say nothing there"),
        (counts["unanswered"], "without an answer, so that none of their tokens counts in the loss"),
        (counts["blank"], "in which a turn before an answer is empty"),
        (counts["repeated"], "the same as an earlier one, which therefore trains more often"),
        (
            counts["dialogues"],
            "whose text holds questions and answers, and counts as a whole in the loss, even the questions; to count "
            "only the answers, write such rows as messages, or as query and response, or train with --loss_mask qa",
        ),
    ):
        if count:
            lines.append(f"note: {counted(count, 'row')} {what}")
    return lines


def left_out(totals: Encoded) -> list[str]:
    """The lines on rows that were not written, or not whole."""
    lines = list(totals.bad.lines(" left out")) if totals.bad else []
    words = {
        "empty": "empty rows left out",
        "too_long": "rows too long, left out",
        "shortened": "rows too long, shortened",
        "equal": "pairs of equal answers left out",
        "dropped": "rows dropped that are the same as an earlier one",
        "bare": "rows left out that lack a prompt or an answer",
    }
    return lines + [f"{totals.counts[name]} {what}" for name, what in words.items() if totals.counts[name]]


def histogram(sizes: np.ndarray) -> list[str]:
    """The lines of a histogram of document lengths, by powers of two."""
    classes = np.ceil(np.log2(np.maximum(sizes, 1))).astype(int)  # class c holds lengths in (2^(c-1), 2^c]
    counts = np.bincount(classes)
    lines = ["tokens a document:"]
    for power in range(int(classes.min()), len(counts)):
        bar = "#" * round(40 * counts[power] / counts.max())
        lines.append(f"  up to {1 << power:>9}  {counts[power]:>9}  {bar}".rstrip())
    return lines


def suggestions(sizes: np.ndarray, tokens: int, answers: bool) -> list[str]:
    """Lines on ctx_len (room for 95 % of the documents, a power of two within 16..4096) and the steps it makes, of rows
    of answers or of a stream."""
    room = 1 << int(np.ceil(np.log2(max(np.percentile(sizes, 95) - 1, 1))))
    ctx_len = min(max(room, 16), 4096, max(tokens - 1, 1))
    windows, batch = -(-(tokens - 1) // ctx_len), 8
    prime = magic_prime(tokens, ctx_len)
    steps = {"pad": counted(-(-len(sizes) // batch), "step"), "get": counted(-(-windows // batch), "step")}
    start = f"a start: --ctx_len {ctx_len} --micro_bsz {batch}; one epoch is "
    if answers:
        lines = [f"{start}{steps['pad']} of {batch} rows"]
    else:
        lines = [
            f"{start}{counted(windows, 'window')} (--dataload get), {steps['get']} of {batch}, or {steps['pad']} of "
            "documents with --dataload pad"
        ]
    if prime:
        lines.append(f"for RWKV-LM: --my_exit_tokens {tokens} --magic_prime {prime}")
    return lines
