"""The thinking of an answer as it is generated: that there is some, and where it ends.

RWKV-7 G1 was also trained to close a thinking at once (data/chat.py, THINK), and does so now and then behind a prompt
that leaves the thinking to it. Peers forbid World's token `</` there: rwkv_lightning_cuda as the second and the third
token of an answer (src/inference/rwkv_inference_engine.cpp; it forbids the letter n, too, for no reason that is
published). ThinkingConstraint forbids every spelling, in any vocabulary, until something was thought; the first token
`></`, by which G1 closes without a line between, is one of them.
"""

import re
from functools import lru_cache

import torch

from ..data.chat import THINK, THINK_CLOSES, THINK_OPENS
from ..data.tokenizer import Tokenizer
from .text import overlap

CLOSING = re.compile(rb"\s*>?\s*</")  # the beginnings of tokens that close a thinking in which nothing was thought


class ThinkingConstraint:
    """The Constraint of an answer behind "<think", of the first `size` tokens: no "</" before anything else."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size
        self.text = ""

    @property
    def begun(self) -> str:
        """The beginning of the thinking, without white space in front; it may be the "<" of a tag."""
        return self.text.lstrip().removeprefix(">").lstrip()

    def allowed(self) -> torch.Tensor | None:
        return opening_masks(self.tokenizer, self.size)[len(self.begun)] if self.begun in ("", "<") else None

    def accept(self, token: int) -> bool:
        if self.begun in ("", "<"):
            self.text += self.tokenizer.decode([token])
        return True


@lru_cache(maxsize=4)
def opening_masks(tokenizer: Tokenizer, size: int) -> torch.Tensor:
    """The tokens that do not close an empty thinking (2, size) bool: before anything of a tag, and behind its "<"."""
    table = getattr(tokenizer, "token_bytes", None)
    if table is None:
        table = [tokenizer.decode([token]).encode() for token in range(size)]
    tokens = [*(token or b"" for token in table[:size]), *[b""] * (size - len(table))]
    return torch.tensor([[not CLOSING.match(token) for token in tokens], [token[:1] != b"/" for token in tokens]])


def constraint_behind(opening: str, tokenizer: Tokenizer, size: int) -> ThinkingConstraint | None:
    """The constraint of an answer behind the end of its prompt, None unless that leaves a thinking to the model."""
    return ThinkingConstraint(tokenizer, size) if opening.endswith(THINK["on"].opening.lstrip()) else None


class ThinkingStream:
    """An answer as it comes, split into its thinking and its words. The beginning of a tag is withheld, and white space
    at the ends of a thinking is dropped."""

    def __init__(self) -> None:
        self.held = ""
        self.thinks: bool | None = None  # None until the beginning of the answer is certain
        self.begun = False  # the thinking, or the words behind it

    def feed(self, text: str, whole: bool = False) -> tuple[str, str]:
        """The new (thinking, words) that are certain; with `whole`, all that are left."""
        self.held = self.held + text if self.begun else (self.held + text).lstrip()
        thinking = ""
        if self.thinks is None:
            if THINK_OPENS.startswith(self.held) and not whole:
                return "", ""
            self.thinks = self.held.startswith(THINK_OPENS)
            self.held = self.held.removeprefix(THINK_OPENS).lstrip()
        if self.thinks:
            inside, closing, rest = self.held.partition(THINK_CLOSES)
            withheld = 0 if closing or whole else overlap(inside, THINK_CLOSES)
            thinking = inside[: len(inside) - withheld].rstrip()
            if not closing:
                self.begun, self.held = self.begun or bool(thinking), inside[len(thinking) :]
                return thinking, ""
            self.thinks, self.begun, self.held = False, False, rest.lstrip()
        words, self.held = self.held, ""
        self.begun = self.begun or bool(words)
        return thinking, words
