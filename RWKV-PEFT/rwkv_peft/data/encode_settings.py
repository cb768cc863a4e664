"""The settings by which rows become documents, and the remedies for mistakes in rows."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple


class Remedies(NamedTuple):
    """The remedies for mistakes, in the flags of the command that reads the rows."""

    unknown_form: str
    no_end: str = "take one that does"


ANSWERED = ("QUESTION ANSWER", "TEXT")
HEADER = "; the first line of a table names its columns: write one, such as question,answer, if it is a row"
ALIKE = ("preprocess", "train", "contexts")  # the commands that learn from every answer


def naming(flag: str, *fields: str) -> str:
    """The remedy for rows whose fields are not known."""
    return f"name yours, as {' or '.join(f'{flag} {each}' for each in fields)}"


REMEDIES = MappingProxyType(
    {
        "preprocess": Remedies(naming("--fields", *ANSWERED), "take --no-append_eod"),
        "train": Remedies(
            naming("--sft_field", *ANSWERED), "make token files with rwkv-peft preprocess --no-append_eod"
        ),
        "pairs": Remedies(naming("--sft_field", "PROMPT CHOSEN REJECTED")),
        "labels": Remedies(naming("--sft_field", "PROMPT ANSWER LABEL")),
        "prompts": Remedies(naming("--sft_field", "PROMPT")),
        "contexts": Remedies(naming("--sft_field", "CONTEXT QUESTION ANSWER")),
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
    - think: how answers of chats are opened, "", "on" or "off" (turns.py)
    - clean_turns: whether texts of others than the assistant are cleaned (turns.py)
    - skip_bad_rows: leave out rows that cannot be read, which are refused otherwise
    - max_tokens: the most that a document may have (0: no limit)
    - too_long: "left" removes tokens from the front of a longer document's prompt, and then from the end of its answer;
      "skip" leaves the document out
    - command: the key of REMEDIES whose flags messages name; with "pairs" each row is two documents, its better and its
      worse answer, with "labels" an answer with its label, with "prompts" a prompt, and with "contexts" two documents,
      its context, and its question and answer, which are never shortened (row_forms.py)
    """

    tokenizer: str = "world"
    end_token: bool = True
    fields: tuple[str, ...] = ()
    template: str = ""
    think: str = ""
    clean_turns: bool = True
    skip_bad_rows: bool = False
    max_tokens: int = 0
    too_long: str = "left"
    command: str = "preprocess"
