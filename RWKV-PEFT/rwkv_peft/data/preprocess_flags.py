"""Parses the flags of preprocess, before numpy is imported."""

import argparse
from types import MappingProxyType

from ..cli.names import AUTO, CUT, DOCUMENT_ENDS, ENCODING, G1, TURNS
from ..cli.parser import Parser, codec, count, switch
from ..cli.rules import EXCLUDES, NEEDS, Rule
from .layouts import TEMPLATES
from .rows import KINDS
from .tools import TOOL_FORMS

PROG = "rwkv-peft preprocess"
WRITING = (
    "--output, --overwrite, --append_eod 0, --fields, --template, --as, --think, --clean_turns 0, --tool_form, "
    "--split, --turns_in_text, --encoding, --document_end, --skip_bad_rows, --drop_duplicates, --show"
)
RULES = (
    Rule(PROG, NEEDS, "--output, --ids", "it writes a data set", "name its PREFIX"),
    Rule("--as", EXCLUDES, "--fields, --template", "these read rows as they are, without speakers", "leave one out"),
    Rule("--template", EXCLUDES, "--fields", "both say which fields are read", "leave one out"),
    Rule("--template", EXCLUDES, "--think", "both open an answer", "write the opening into it, as think and no-think"),
    Rule("--turns_in_text", EXCLUDES, "--template", "that reads rows as they are", "leave one out"),
    Rule(WRITING, EXCLUDES, "--ids", "that only prints token ids", "leave it out"),
)
# flags of other tools that make token files -> their equivalents here
SYNONYMS = MappingProxyType(
    {
        "--input": "the file's name, without a flag",
        "--output_prefix": "--output",
        "--tokenizer_type": "--tokenizer world, which is the default",
        "--vocab_file": "--tokenizer FILE, and needs none for World",
        "--jsonl_keys": "--fields",
    }
)


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog=PROG, synonyms=SYNONYMS, rules=RULES, description="Text files to token files (.bin and .idx).")
    add = parser.add_argument
    add("input", nargs="+", help=KINDS)
    add("--output", metavar="PREFIX", help="write PREFIX.bin and PREFIX.idx; required unless --ids")
    add(
        "--ids",
        action="store_true",
        help="take INPUT for a text itself, and only print its token ids, as train.py --mask_id takes them",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace a data set of that name (default: only one that was made from the same inputs)",
    )
    add("--tokenizer", default="world", metavar="NAME|FILE", help="world, bytes, or a vocabulary file (default: world)")
    add(
        "--append_eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's end token (default: do)",
    )
    add(
        "--fields",
        nargs="+",
        default=[],
        metavar="NAME",
        help="the field that holds the text or the turns, or those that hold a prompt and its answer",
    )
    add(
        "--template",
        default="",
        metavar="NAME|FILE",
        help=f"{', '.join(TEMPLATES)}, or a text with {{field}} for fields and [[ ]] around the parts that count",
    )
    add(
        "--as",
        default="",
        metavar="NAME",
        help="in a dialogue of people, such as WhatsApp's .txt, the one whose words are learned (without it the "
        "message lists the names)",
    )
    add(
        "--think",
        default="",
        choices=("on", "off"),
        help="chats of RWKV-7 G1: on opens an answer with <think if the row holds thinking, else with <think></think; "
        "off opens all with <think></think, without the rows' thinking (default: answers as in the rows)",
    )
    add(
        "--clean_turns",
        type=switch,
        default=True,
        metavar="0|1",
        help="remove blank lines from what is not the assistant's in a chat, as RWKV-7 G1 was trained, because a blank "
        "line and a speaker's name begin a turn; PREFIX.json records a 0 (default 1)",
    )
    add(
        "--tool_form",
        default=G1,
        choices=tuple(TOOL_FORMS),
        help="the form of tools, their calls and results in chats: g1, as RWKV-7 G1's own prompts have it, with calls "
        "in ```json and results as a user's Function output; hermes with <tools>, <tool_call> and the speaker Tool; "
        "PREFIX.json records it (default %(default)s)",
    )
    add("--split", default="", metavar="TRAIN[A:B]", help="rows to read, such as train[:1000] or [500:]")
    add("--turns_in_text", default="", choices=(AUTO,), help=TURNS)
    add("--encoding", type=codec, default="", metavar="NAME", help=ENCODING)
    add("--document_end", default="", choices=DOCUMENT_ENDS, help=CUT)
    add("--skip_bad_rows", action="store_true", help="leave out rows that cannot be read, and count them by kind")
    add(
        "--show",
        type=count,
        default=0,
        metavar="N",
        help="also print the first N documents, long texts without their middle, with the parts that count in the loss "
        "marked and <end> for the end token",
    )
    add(
        "--drop_duplicates",
        action="store_true",
        help="leave out rows whose tokens are those of an earlier row; takes some 100 bytes of memory a row (default: "
        "they are counted, and stay)",
    )
    return parser.parse_args(argv)
