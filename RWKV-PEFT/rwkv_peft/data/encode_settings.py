"""The settings by which rows become documents, and the remedies for mistakes in rows."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple


class Remedies(NamedTuple):
    """The remedies for mistakes, in the flags of the command that reads the rows."""

    unknown_form: str
    no_end: str


REMEDIES = MappingProxyType(
    {
        "preprocess": Remedies("name others with --fields", "take --no-append_eod"),
        "train": Remedies("name others with --sft_field", "make token files with rwkv-peft preprocess --no-append_eod"),
        "pairs": Remedies("name others with --sft_field", "take one that does"),
        "labels": Remedies("name others with --sft_field", "take one that does"),
        "prompts": Remedies("name another with --sft_field", "take one that does"),
        "contexts": Remedies("name others with --sft_field", "take one that does"),
    }
)


@dataclass(frozen=True)
class EncodeSettings:
    """The settings by which rows become documents.

    - tokenizer: a name or path for load_tokenizer
    - end_token: whether each document ends with the tokenizer's end_id
    - fields: the field of the row's text, or those of its prompt and answer, of its prompt, better and worse answer, or
      of its context, question and answer, if they are not to be recognised
    - template: the text of a template
    - think: how answers of chats are opened, "", "on" or "off" (thinking.py)
    - skip_bad_rows: leave out rows that cannot be read, which are refused otherwise
    - max_tokens: the most that a document may have (0: no limit)
    - too_long: "left" removes tokens from the front of a longer document's prompt, and then from the end of its answer;
      "skip" leaves the document out
    - command: the key of REMEDIES whose flags messages name; with "pairs" each row is two documents, its better and its
      worse answer (pairs.py), with "labels" an answer with its label (labels.py), with "prompts" a prompt (prompts.py),
      and with "contexts" two documents, its context, and its question and answer (contexts.py), which are never
      shortened
    """

    tokenizer: str = "world"
    end_token: bool = True
    fields: tuple[str, ...] = ()
    template: str = ""
    think: str = ""
    skip_bad_rows: bool = False
    max_tokens: int = 0
    too_long: str = "left"
    command: str = "preprocess"

    @property
    def remedies(self) -> Remedies:
        return REMEDIES[self.command]

    @property
    def pairs(self) -> bool:
        return self.command == "pairs"

    @property
    def labels(self) -> bool:
        return self.command == "labels"

    @property
    def prompts(self) -> bool:
        return self.command == "prompts"

    @property
    def contexts(self) -> bool:
        return self.command == "contexts"

    @property
    def answered(self) -> bool:
        """True if each document needs a prompt and an answer."""
        return self.pairs or self.labels
