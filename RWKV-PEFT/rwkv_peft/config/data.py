"""Settings of the data that a run reads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from ..cli.errors import UserError
from ..cli.names import AUTO, CUT, DOCUMENT_ENDS, ENCODING, G1, HERMES, LOSS_MASKS, TURNS
from ..cli.parser import above_zero, alias, codec, count, open_share, positive, switch
from ..cli.tables import SAMPLINGS
from .setting import setting


class DataType(NamedTuple):
    """A kind of data. documents: the documents that a sample packs, 1 if --dataload decides; fields: the numbers of
    fields that --sft_field may name, and their meaning; () for tokens, which have no fields."""

    documents: int = 1
    fields: tuple[int, ...] = ()
    named: str = ""

    def check_fields(self, given: Sequence[str]) -> None:
        """Raise UserError for a number of fields that such rows do not have."""
        if given and len(given) not in self.fields:
            raise UserError(f"--sft_field {' '.join(given)}: {self.named}; name all, or leave them to be recognised")


DATA_TYPES = MappingProxyType(
    {
        "binidx": DataType(),
        "sft": DataType(1, (1, 2, 3), "one field is a text, two are a prompt and its answer, three those of a form"),
        "pairs": DataType(2, (3,), "pairs have three fields, the prompt, the better answer and the worse"),
        "labels": DataType(2, (3,), "labelled rows have three fields, the prompt, its answer and the label"),
        "prompts": DataType(8, (1,), "prompts have one field"),
        "contexts": DataType(1, (3,), "rows with contexts have three fields, the context, the question and its answer"),
    }
)
OF_ROWS = tuple(name for name, kind in DATA_TYPES.items() if kind.fields)


def think_bounds(given: Sequence[int]) -> tuple[int, ...]:
    """The two bounds of --think_labels, in tokens; () for none. Raises UserError if they are not two in order."""
    bounds = {(): (), (0,): (), (1,): (128, 1024)}.get(tuple(given), tuple(given))
    if bounds and (len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]):
        shown = " ".join(map(str, given))
        raise UserError(f"--think_labels {shown}: it is two numbers of tokens, the smaller one first, such as 32 256")
    return bounds


@dataclass(frozen=True)
class DataConfig:
    """The data, and the order in which it is read.

    path and `more` are the data files, mixed by the shares of `mix`, and replay is one that has replay_share of the
    tokens that count in the loss. Each is the prefix of a .bin/.idx pair (data_type "binidx"), or a file or folder of
    rows that tokenizer turns into tokens: questions and answers ("sft"), prompts with two answers each ("pairs"),
    prompts with an answer and its label ("labels"), prompts that the model answers itself ("prompts"), or questions and
    answers with a context that only a teacher reads ("contexts"). seed draws the order of the samples; None keeps the
    file's. bucketed: True if dataload "pad" brings rows of similar length together; None: if rows share a batch.
    """

    path: str = setting(
        "",
        "for rows a .jsonl, .json, .csv, .parquet or .txt, or a folder of them; for tokens the PREFIX of PREFIX.bin "
        "and PREFIX.idx; several are mixed, by --data_mix",
        flag="data_file",
        required=True,
        nargs="+",
        metavar="PREFIX",
    )
    more: tuple[str, ...] = setting(())
    mix: tuple[float, ...] = setting(
        (),
        "the share of the counted tokens that each --data_file has, such as 0.7 0.3; an epoch counts as many as all "
        "hold (default: each file's own share, so that all are read equally often)",
        flag="data_mix",
        type=above_zero,
        metavar="SHARE",
    )
    replay: str = setting(
        "",
        "also read this file, text or rows that the base knows, between those of --data_file, so that the run forgets "
        "less; it is of the same --data_type, and its fields are recognised",
        metavar="PREFIX",
    )
    replay_share: float = setting(
        0.1,
        "the share of the counted tokens that --replay has; an epoch still reads all of --data_file once",
        type=open_share,
        metavar="SHARE",
    )
    data_type: str = setting(
        "binidx",
        "form of the data. "
        "binidx: tokens; sft: rows of questions and answers, tokenized once into a cache; pairs: rows of a prompt, a "
        "chosen and a rejected answer; labels: rows of a prompt, an answer and a label, true if it is desirable; "
        "prompts: rows of a prompt, which the model answers itself, and of what --reward reads; contexts: rows of a "
        "context, a question and its answer, which is learned without the context. jsonl is RWKV-PEFT's "
        "word for sft",
        type=alias((("jsonl", "sft"),)),
        choices=tuple(DATA_TYPES),
    )
    tokenizer: str = setting("world", "world, bytes or a tokenizer.json", metavar="NAME")
    sft_field: tuple[str, ...] = setting(
        (),
        "sft: the field that holds the text or the turns, or those of question and answer; pairs: those of prompt, "
        "chosen and rejected; labels: those of prompt, answer and label; prompts: that of the prompt; contexts: those "
        "of context, question and answer (default: recognised)",
        metavar="FIELD",
    )
    sft_split: str = setting(
        "",
        "rows of --data_file to take, such as train[:1000]; --val_data and --retain_data give all their "
        "rows, or in a folder of several splits those of the same split (--val_data: of its validation or test split)",
        metavar="SPLIT",
    )
    sft_as: str = setting(
        "",
        "in a dialogue of people, such as WhatsApp's .txt, the one whose words are learned (without it the message "
        "lists the names)",
        metavar="NAME",
    )
    sft_long: str = setting(
        "left",
        "rows longer than --ctx_len lose the front of their prompt, or are left out; with a context they are refused, "
        "or left out",
        choices=("left", "skip"),
    )
    sft_think: str = setting(
        "",
        "how chats open their answers for RWKV-7 G1: on with the thinking that a row holds, else an empty "
        "one; off with an empty one everywhere (default: as rows have them)",
        choices=("on", "off"),
    )
    think_labels: tuple[int, ...] = setting(
        (),
        "end each user's turn before a thinking with RWKV-7 G1's words for its length: (think a bit) below the first "
        "number of tokens, (think a lot) above the second, (think) between; 1: 128 1024",
        type=count,
        metavar="TOKENS",
    )
    clean_turns: bool = setting(
        True,
        "remove blank lines from what is not the assistant's in a chat, as RWKV-7 G1 was trained, because a blank line "
        "and a speaker's name begin a turn",
        type=switch,
    )
    tool_form: str = setting(
        G1,
        "the form of tools, their calls and results in chats: g1, as RWKV-7 G1's own prompts have it, with calls in "
        "```json and results as a user's Function output; hermes with <tools>, <tool_call> and the speaker Tool",
        choices=(G1, HERMES),
    )
    turns_in_text: str = setting("", TURNS, choices=(AUTO,))
    encoding: str = setting("", ENCODING, type=codec, metavar="NAME")
    document_end: str = setting("", CUT, choices=DOCUMENT_ENDS)
    skip_bad_rows: bool = setting(
        False, "leave out rows that cannot be read, and count them by kind (default: such rows are refused)"
    )
    ctx_len: int = setting(1024, "the most tokens of a sample", type=positive)
    dataload: str = setting(
        "get",
        "how documents become samples. "
        "get: windows of the token stream; pad: one document in a row, padded; only: one document without padding; "
        "pack: several whole documents in a row, none seeing another (default: pad for rows of answers, which are sft "
        "and token files with a PREFIX.mask; pack for other rows; else get)",
        unset=True,
        choices=tuple(SAMPLINGS),
    )
    loss_mask: str = setting(
        "none",
        "tokens that count: none and pad count all but padding, qa those after --mask_id, se those between --mask_id "
        "and --mask_end_id, file reads PREFIX.mask, which preprocess writes if only answers count (default file if "
        "there is a PREFIX.mask, else none; of rows: file)",
        unset=True,
        choices=LOSS_MASKS,
    )
    mask_id: tuple[int, ...] = setting(
        (),
        "token ids that open an answer; or RWKV-PEFT's JSON of two texts: mask1 opens the "
        "part that counts, and mask0 closes it",
        metavar="ID",
    )
    mask_end_id: tuple[int, ...] = setting(
        (), "token ids that close it (se), or open the next question (qa)", type=count, metavar="ID"
    )
    seed: int | None = setting(42)
    bucketed: bool | None = setting(None)
    micro_bsz: int = setting(
        1,
        "samples of a device in a forward pass; a pair of answers is one, and so is a labelled answer, and a prompt "
        "with all of its answers; without the flag a GPU takes up to 8, by its memory and the data",
        type=positive,
    )
    num_generations: int = setting(8, "prompts: answers that are drawn to each", type=positive)
    max_completion_length: int = setting(
        256,
        "prompts: the most tokens of an answer, which is cut there; a prompt has --ctx_len less these",
        type=positive,
    )

    @property
    def own(self) -> "DataConfig":
        """The same without replay."""
        return replace(self, replay="", replay_share=DataConfig.replay_share)

    @property
    def files(self) -> tuple[str, ...]:
        """The files that a run trains on, replay last."""
        return (self.path, *self.more, *filter(None, [self.replay]))

    @property
    def of_rows(self) -> bool:
        """True if the data is rows that are not tokenized yet."""
        return self.data_type in OF_ROWS

    @property
    def of_answers(self) -> bool:
        """True if only the answers in rows count: these are read one by one."""
        return self.data_type == "sft" or (self.data_type == "binidx" and self.loss_mask == "file")

    @property
    def of_prompts(self) -> bool:
        """True if the data is prompts, which the model answers itself."""
        return self.data_type == "prompts"

    @property
    def of_contexts(self) -> bool:
        """True if only a teacher reads a part of each row."""
        return self.data_type == "contexts"

    @property
    def buckets(self) -> bool:
        """True if dataload "pad" brings rows of similar length together."""
        return self.micro_bsz > 1 if self.bucketed is None else self.bucketed

    @property
    def longest(self) -> int:
        """The most tokens of a document of rows."""
        return self.ctx_len - self.max_completion_length if self.of_prompts else self.ctx_len + 1

    @property
    def documents(self) -> int:
        """The number of documents that a sample packs, or 1; of a prompt, its number of answers."""
        return self.num_generations if self.of_prompts else DATA_TYPES[self.data_type].documents
