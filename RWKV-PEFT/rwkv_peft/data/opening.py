"""Finds the text that opens the answers of a data set, with which a prompt ends to ask for one."""

import numpy as np

from ..errors import UserError
from .binidx import BinidxDataset
from .recorded import Vocabulary, vocabulary_of
from .templates import opening_within, stops_of
from .tokenizer import Tokenizer, load_tokenizer
from .turns import TURN_END

ENTRY = "opening"  # of a run's config.json
DOCUMENTS, TOKENS = 20, 4096  # documents that are looked at, and tokens of each


def opening_of(dataset: BinidxDataset, vocabulary: Vocabulary | None) -> str:
    """The text that opens an answer in the first documents, such as "Assistant:" or "Assistant: <think"; "" if none has
    a known one, or their tokenizer is not available."""
    tokenizer = at_hand(vocabulary) if vocabulary is not None else None
    if tokenizer is None:
        return ""
    found = (opening_of_document(dataset, index, tokenizer) for index in range(min(len(dataset), DOCUMENTS)))
    return next(filter(None, found), "")


def opening_of_document(dataset: BinidxDataset, index: int, tokenizer: Tokenizer) -> str:
    tokens, start = dataset[index], dataset.start(index)
    learned = np.ones(len(tokens)) if dataset.mask is None else dataset.mask[start : start + len(tokens)]
    if not learned.any():
        return ""
    if learned[0]:  # a text, whose prompt counts too
        return opening_within(tokenizer.decode(tokens[:TOKENS].tolist()))
    first = int(learned.argmax())
    prompt = tokenizer.decode(tokens[max(0, first - TOKENS) : first].tolist())
    return prompt.rpartition(TURN_END)[2] if stops_of(prompt) else ""


def at_hand(vocabulary: Vocabulary) -> Tokenizer | None:
    """Load the tokenizer of a Vocabulary; None if its file or package is gone, or has changed."""
    try:
        tokenizer = load_tokenizer(vocabulary.name)
    except UserError:
        return None
    return tokenizer if vocabulary_of(tokenizer).hash == vocabulary.hash else None
