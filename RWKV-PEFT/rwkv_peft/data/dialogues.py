"""What rows write out in texts -> turns of a chat: turns, by speakers' names or in the templates of other models, and
tools with their calls and results, in the tags of Hermes."""

import ast
import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..cli.errors import UserError, short
from .chat import role_in, speaker_of
from .fields import CALLS, LISTS
from .tools import functions_of, parsed

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
DECODE = json.JSONDecoder().raw_decode
GLAIVE = re.compile(r"(?:\A|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
GLAIVES = MappingProxyType({"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"})
QUOTED = re.compile(r"(?<=\"arguments\":)\s*'(.*)'(?=\s*\})", re.DOTALL)
BRACKETS = "(params_name"  # in texts that ask for calls in brackets, which ASKS matches
ASKS = re.compile(
    r"[^.\n]*\[func\w*\(.*?\)\]\.?|Should you decide to return the function call[^.\n]*\.?"
    r"|NO other text MUST be included\.?"
)
# a field of a call in brackets, where its value may end, and the end of the call
FIELD = re.compile(r"\s*,?\s*([^\s=(),\[\]]+)\s*=\s*(?!=)")
ENDS, CLOSING = re.compile(r"[,)]"), re.compile(r"\s*,?\s*\)\s*[,\]]")


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


def glaive(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a row of Glaive's: its system text lists functions, one JSON behind the other, and its chat is of
    USER:, ASSISTANT: and FUNCTION RESPONSE:, with calls behind <functioncall>."""
    words, _, text = row["system"].removeprefix("SYSTEM:").partition("{")
    text, tools = "{" * bool(text) + text, list[Any]()
    while text.startswith("{"):
        tool, end = DECODE(text)
        tools.append(tool)
        text = text[end:].lstrip()
    system = {"role": "system", "content": f"{words.strip().removesuffix('-').strip()}\n{text}".strip()}
    turns: list[dict[str, Any]] = [system | ({LISTS[0]: tools} if tools else {})]
    first, *rest = GLAIVE.split(row["chat"])
    if first.strip():
        raise UserError(f"a chat begins {short(first.strip())!r}, and is to begin with USER:")
    for name, said in zip(rest[::2], rest[1::2]):
        words, *calls = CLOSES.sub("", said).split("<functioncall>")
        # their arguments are JSON in quotes of Python's
        calls = [QUOTED.sub(lambda match: match[1].replace("\\'", "'"), call).strip() for call in calls]
        found = {CALLS[0]: [parsed(call, "a call of a tool") for call in calls]} if calls else {}
        turns.append({"role": GLAIVES[name], "content": words.strip()} | found)
    return turns


def bracket_calls(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a row of ToolACE's: its system text lists functions in JSON, and asks for calls in the form
    [name(field=value)], in which its answers have them."""
    words = row["system"]
    begin = re.search(r"\[\s*\{|\Z", words).start()  # type: ignore[union-attr]
    tools, end = DECODE(words, begin)
    asks = ASKS.sub("", re.sub(r"[^.:\n]*:\s*\Z", "", words[:begin]) + words[end:].lstrip("."))
    names = sorted((re.escape(tool["name"]) for tool in functions_of(tools)), key=len, reverse=True)
    opens = re.compile(rf"\s*({'|'.join(names)})\s*\(")
    turns: list[dict[str, Any]] = [{"role": "system", "content": asks.strip(), LISTS[0]: tools}]
    for turn in row["conversations"]:
        role, said = role_in(turn), words_in(turn)
        calls = calls_in(said.strip(), opens) if speaker_of(role) == "Assistant" else []
        turns.append({"role": role} | ({CALLS[0]: calls} if calls else {"content": said}))
    return turns


def calls_in(text: str, opens: re.Pattern[str]) -> list[dict[str, Any]]:
    """The calls in a text of the form [name(field=value, …), …] with names that `opens` matches; [] for a text that
    begins otherwise. Raises UserError for calls that cannot be read."""
    calls, place = list[dict[str, Any]](), 1
    while text.startswith("[") and (call := opens.match(text, place)):
        fields, place = dict[str, Any](), call.end()
        while field := FIELD.match(text, place):
            ends = (end.start() for end in ENDS.finditer(text, field.end()))
            read = ((end, value_of(f"[{text[field.end() : end].strip()}]")) for end in ends)
            place, value = next((pair for pair in read if pair[1]), (len(text), [None]))
            fields[field[1]] = value[0]
        closing = CLOSING.match(text, place)
        if not closing:
            raise UserError(f"an answer's calls are {short(text)!r}; they are to be [name(field=value, …), …]")
        calls.append({"name": call[1], "arguments": fields})
        place = closing.end()
    return calls


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
