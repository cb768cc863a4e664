"""What rows write out in texts -> turns of a chat: turns, by speakers' names or in the templates of other models, and
tools with their calls and results, in the tags of Hermes."""

import ast
import json
import re
from types import MappingProxyType
from typing import Any

from ..cli.errors import UserError
from .chat import role_in, speaker_of
from .fields import CALLS, LISTS
from .tools import functions_of

ROLES = MappingProxyType(  # the name or mark that opens a turn, in lower case -> the role
    dict.fromkeys(("system", "<<sys>>"), "system")
    | dict.fromkeys(
        ("human", "user", "question", "instruction", "input", "用户", "人类", "问", "[inst]", "<</sys>>"), "user"
    )
    | dict.fromkeys(("assistant", "answer", "response", "gpt", "bot", "model", "助手", "答", "[/inst]"), "assistant")
)
NAMES = "|".join(role for role in ROLES if role.isalpha())
CLOSES = re.compile(r"<\|(?:im_end|eot_id|end|endoftext|begin_of_text|end_of_text)\|>|<end_of_turn>|<bos>|<eos>|</?s>")
MARKED = tuple(  # what opens a turn in templates with marks of their own
    re.compile(opens, re.IGNORECASE)
    for opens in (
        r"<\|im_start\|>(\w+)\n",
        r"<\|start_header_id\|>(\w+)<\|end_header_id\|>",
        r"<start_of_turn>(\w+)\n",
        r"<\|(system|user|assistant)\|>",
        r"(<</?SYS>>|\[/?INST\])",
        rf"### ?({NAMES}) ?:",
    )
)
NAMED = tuple(  # a name begins a turn behind a blank line, or else on any line
    re.compile(rf"(?:\A|{gap})\s*({NAMES}) ?[:：]", re.IGNORECASE) for gap in (r"\n\s*\n", r"\n")
)
# a text with turns begins with a name, or has one of these marks
BEGINS = re.compile(rf"\s*(?:{NAMES}) ?[:：]", re.IGNORECASE)
MARKS = ("<|", "### ", "[/INST]", "<start_of_turn>")
TOOLS = "<tools>"
# a list of tools, with what is said of the calls behind it; a call; the tags of a result
LISTING = re.compile(r"<tools>\s*([\[{].*?)\s*</tools>(?:.*</tool_call>[^.\n]*\.?)?", re.DOTALL)
CALL = re.compile(r"\s*<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
RESULT = re.compile(r"\s*</?tool_response>\s*")


def written_turns(text: str) -> list[dict[str, str]]:
    """The turns {role, content} of a text of two speakers; [] for any other. The last may be empty, the opening of an
    answer. Words before a template's first mark are the system's."""
    if not BEGINS.match(text) and not any(map(text.__contains__, MARKS)):
        return []
    for opens in (*MARKED, *NAMED):
        front, *rest = opens.split(text)
        words = [CLOSES.sub("", part).strip() for part in (front, *rest[1::2])]
        roles = ["system", *(ROLES.get(role.lower(), "") for role in rest[::2])]
        if "" in roles or not {"user", "assistant"} <= {*roles} or (words[0] and opens in NAMED):
            continue
        turns = list[dict[str, str]]()
        for place, (role, said) in enumerate(zip(roles, words)):
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += f"\n{said}"
            elif said or place == len(words) - 1:
                turns.append({"role": role, "content": said})
        return turns
    return []


def untagged(turns: Any) -> Any:
    """Turns with the tools, calls and results that stand in tags in their words as fields, if a system turn lists tools
    so; the turns themselves if none does. A sentence that names the tags before the list is left out."""
    if not isinstance(turns, list) or not any(TOOLS in words_in(turn) for turn in turns):
        return turns
    result = list[Any]()
    listed = False
    for turn in turns:
        words, name = words_in(turn), "content" if isinstance(turn, dict) and "role" in turn else "value"
        if words and role_in(turn) in ("system", "developer") and (listing := LISTING.search(words)):
            begin = words.find(TOOLS)
            begin = max(words.rfind(". ", 0, begin), words.rfind("\n", 0, begin)) + 1
            tools = value_of(listing[1]) or [value_of(line) for line in listing[1].splitlines()]
            try:
                fields = {LISTS[0]: functions_of(tools)}
            except UserError:
                return turns
            turn = turn | fields | {name: "\n".join((words[:begin].rstrip(), words[listing.end() :].lstrip())).strip()}
            listed = True
        elif not words or not listed:
            pass
        elif speaker_of(role_in(turn)) == "Assistant" and not turn.get(CALLS[0]):
            calls = list(map(value_of, CALL.findall(words)))
            turn = turn | ({CALLS[0]: calls, name: CALL.sub("", words)} if calls and all(calls) else {})
        elif speaker_of(role_in(turn)) == "Tool":
            turn = turn | {name: RESULT.sub("\n", words).strip()}
        result.append(turn)
    return result if listed else turns


def words_in(turn: Any) -> str:
    """The words of a turn, "" if they are no text."""
    words = turn.get("content" if "role" in turn else "value") if isinstance(turn, dict) else ""
    return words if isinstance(words, str) else ""


def value_of(text: str) -> Any:
    """The value of JSON, or of Python's notation, which Hermes' own rows have; None of any other text."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass
    return None
