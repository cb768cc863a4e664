"""Tools, calls of tools and their results in chats: rows' objects -> text, and the text of an answer -> its calls.

RWKV-7 G1 was trained on many forms of calls (RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt). Two of them are written here.
g1 is the one in which its author's demo of the newest models calls tools (BlinkDL/Albatross, faster3a_2607/app4b.py, of
rwkv-g1k): the system turn lists the tools, an answer is JSON in a fence, and a user's turn holds a function's output.
hermes is the one that several RWKV runtimes write and parse (RWKV-Vibe/rwkv_lightning, API_servers/openai_adapter.py;
RWKV-APP/RWKV_APP, lib/func/g1h_agent_protocol.dart): calls in tags, results here by the speaker Tool. Models answer in
either form, so that both are parsed, whichever is written.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from ..cli.errors import UserError, quoted, short
from ..cli.names import G1, HERMES
from .fields import CALLS, LISTS, NOTHING

THOUGHT = re.compile(r"\s*(?:<think>.*?(?:</think>|\Z)|>.*?</think>)|", re.DOTALL)  # with or without its prompt's part
# Answers hold JSON in fences for other reasons, too: a fence alone opens a call if the object begins with a name.
FENCE = re.compile(r'```json\s*(?=(?:\[\s*)?\{\s*"name")')
OPENS = re.compile(rf"<tool_call>\s*|\*\*Tool Call:\*\*\s*```(?:json)?\s*|{FENCE.pattern}")
# the texts that OPENS matches, without spaces
OPENINGS = ("<tool_call>", "**ToolCall:**```", '```json{"name"', '```json[{"name"')
SIGNS, LONGEST = re.compile(r"[<*`]"), 80  # their first characters, and the most of one with spaces
SPACE = re.compile(r"\s*")
CLOSINGS = ("</tool_call>", "```")
CLOSES = re.compile(rf"\s*(?:{'|'.join(CLOSINGS)})|")


class ToolCall(NamedTuple):
    """A call of the tool `name`."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return json.dumps(self._asdict(), ensure_ascii=False)


@dataclass(frozen=True)
class ToolForm:
    """A form of tools in chats.

    listing and calls are the texts before the first, between two, and behind the last; brackets are those within
    `calls` around several; separators are JSON's. A result is the words of `speaker` behind the text `result`.
    """

    name: str
    listing: tuple[str, str, str]
    calls: tuple[str, str, str]
    brackets: tuple[str, str]
    separators: tuple[str, str]
    speaker: str
    result: str

    def dumps(self, value: object) -> str:
        """The JSON of a value."""
        return json.dumps(value, ensure_ascii=False, separators=self.separators)

    def tools_text(self, tools: object) -> str:
        """The part of a system turn that lists functions_of(tools), "" for none."""
        begin, between, end = self.listing
        lines = list(map(self.dumps, functions_of(tools)))
        return f"{begin}{between.join(lines)}{end}" if lines else ""

    def listed(self, holder: Mapping[str, Any]) -> str:
        """tools_text of a row or a turn that lists tools in one of LISTS."""
        return self.tools_text(next((holder[name] for name in LISTS if holder.get(name)), None))

    def calls_text(self, calls: object) -> str:
        """The part of an answer that calls tools, "" for none. calls is a call, a list of calls, or the JSON of either
        as text; each is {name, arguments}, perhaps within {"type": "function", "function": …}."""
        found = parsed(calls, "a call of a tool")
        texts = [] if found in NOTHING else [self.dumps(call_of(each)._asdict()) for each in as_list(found)]
        begin, between, end = self.calls
        left, right = self.brackets if len(texts) > 1 else ("", "")
        return f"{begin}{left}{between.join(texts)}{right}{end}" if texts else ""

    def called(self, turn: Mapping[str, Any]) -> str:
        """calls_text of a turn."""
        return "\n".join(filter(None, (self.calls_text(turn.get(name)) for name in CALLS)))


TOOL_FORMS = MappingProxyType(
    {
        G1: ToolForm(
            G1,
            listing=("Tools:\n[", ",", "]\nTo use a tool, return only a JSON function call."),
            calls=("```json\n", ",", "\n```"),
            brackets=("[", "]"),
            separators=(",", ":"),
            speaker="User",
            result="Function output:\n",
        ),
        HERMES: ToolForm(
            HERMES,
            listing=(
                "<tools>\n",
                "\n",
                '\n</tools>\nTo call one, answer <tool_call>{"name": …, "arguments": {…}}</tool_call>.',
            ),
            calls=("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
            brackets=("", ""),
            separators=(", ", ": "),
            speaker="Tool",
            result="",
        ),
    }
)


def functions_of(tools: object) -> list[dict[str, Any]]:
    """The functions {name, description, parameters} in a list of tools, or in its JSON as text; each may be within
    {"type": "function", "function": …}. Raises UserError for any other value."""
    found = parsed(tools, "the list of tools")
    listed = [] if found in NOTHING else as_list(found)
    functions: list[Any] = [each.get("function", each) if isinstance(each, dict) else each for each in listed]
    for function in functions:
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"a tool is {quoted(function)}; it needs a name, and mostly has parameters")
    # as Anthropic's requests name them
    return [{"parameters" if name == "input_schema" else name: each for name, each in one.items()} for one in functions]


def call_of(value: object) -> ToolCall:
    """The ToolCall in a row's value. Raises UserError for any other value, and for arguments that are no object."""
    call = value.get("function", value) if isinstance(value, dict) else value
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        raise UserError(f"a call of a tool is {quoted(value)}; it needs a name and arguments")
    name = call["name"]
    arguments = parsed(call.get("arguments", call.get("parameters")), f"the arguments of the call of {short(name)}")
    if arguments in NOTHING:
        return ToolCall(name, {})
    if not isinstance(arguments, dict):
        raise UserError(f"the arguments of the call of {short(name)} are {quoted(arguments)}, and an object is due")
    return ToolCall(name, arguments)


def parsed(value: object, what: str) -> object:
    """The value itself, or the value of its JSON if it is a text."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is a text that is not JSON ({error}): {short(value)}") from error


def as_list(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else [value]


def ordered(turns: Sequence[Any]) -> list[Any]:
    """Turns, with results that name their call (tool_call_id) in the order of the calls."""
    keys, calls, calling = list[tuple[int, int]](), dict[str, int](), 0
    for place, turn in enumerate(turns):
        fields = turn if isinstance(turn, dict) else {}
        if isinstance(found := fields.get("tool_calls"), list) and found:
            calling = place
            calls = {str(each.get("id")): number for number, each in enumerate(found, 1) if isinstance(each, dict)}
        answers = calls.get(str(fields["tool_call_id"])) if fields.get("tool_call_id") is not None else None
        keys.append((place, 0) if answers is None else (calling, answers))
    return [turns[place] for place in sorted(range(len(turns)), key=keys.__getitem__)]


def parse_calls(text: str) -> tuple[str, list[ToolCall]]:
    """Split the text of an answer, all behind "Assistant:" -> (its other words, its calls).

    A thinking is among the words, and calls nothing; neither does an opening without JSON of a call behind it."""
    place = end_of(THOUGHT, text, 0)
    kept, calls = [text[:place]], list[ToolCall]()
    decode = json.JSONDecoder().raw_decode
    while opening := OPENS.search(text, place):
        found, end = list[ToolCall](), opening.end()
        fenced = FENCE.match(text, opening.start())
        try:
            while text.startswith(("{", "["), end):
                value, end = decode(text, end)
                if fenced and not all(isinstance(each, dict) and "arguments" in each for each in as_list(value)):
                    raise ValueError("an object with a name that is no call")
                found += [call_of(each) for each in as_list(value)]
                end = end_of(SPACE, text, end)
        except (UserError, ValueError, RecursionError):  # JSON of something else, or no JSON
            found = []
        end = end_of(CLOSES, text, end) if found else opening.end()
        if found and any(closing.startswith(text[end:]) for closing in CLOSINGS):  # cut by a limit
            end = len(text)
        kept.append(text[place : opening.start() if found else end])
        calls += found
        place = end
    return "".join([*kept, text[place:]]).strip(), calls


def end_of(pattern: re.Pattern[str], text: str, place: int) -> int:
    """The place behind the match of a pattern, which may be empty, at `place`."""
    match = pattern.match(text, place)
    assert match is not None
    return match.end()


def undecided(text: str, place: int) -> int:
    """The first place from `place` on where the text opens a call, or may yet; the text's end if there is none."""
    for sign in SIGNS.finditer(text, place):
        begun = "".join(text[sign.start() : sign.start() + LONGEST].split())
        if any(begun.startswith(opening) or opening.startswith(begun) for opening in OPENINGS):
            return sign.start()
    return len(text)
