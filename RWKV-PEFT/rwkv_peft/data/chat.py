"""The layout of RWKV's chats: turns -> segments (text, counts); the model learns the texts that count.

Answers with thinking are laid out as RWKV-7 G1 writes them: <think>, the thinking, </think>, the answer. A prompt that
ends in "Assistant: <think" opens a thinking, and "Assistant: <think></think" an empty one before an immediate answer;
the model continues there (RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt). Words at the end of the user's turn set the
length of the thinking.

A turn begins behind TURN_END with a speaker's name. Texts of a system, a user or a tool hold no TURN_END if they are
cleaned, as in G1's training, so that none of them forges a turn of somebody else; nor do they begin as a result of a
tool in a turn of the user's does.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from ..cli.errors import UserError, field_names, quoted, short
from ..cli.names import G1
from .fields import CALLS, LISTS, NOTHING, field, json_kind, refuse_media
from .tools import TOOL_FORMS, ToolForm, as_list, functions_of, ordered, parsed

Segment = tuple[str, bool]  # a text, and True if it counts in the loss
TURN_END = "\n\n"  # token 261 of the World vocabulary
QUOTE = "> "  # before words that would forge a tool's result
THINK_OPENS, THINK_CLOSES = "<think>", "</think>"
# other marks of a thinking and of the answer behind it, as in OpenThoughts' rows
THOUGHT_AND_SOLUTION = re.compile(
    r"<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*?)(?:<\|end_of_solution\|>)?",
    re.DOTALL,
)


class ThinkMode(NamedTuple):
    """The end of the user's turn, and the text behind "Assistant:", by which a prompt sets the thinking."""

    words: str
    opening: str

    @property
    def thinks(self) -> bool:
        """True if the opening leaves the thinking to the model."""
        return not self.opening.endswith(THINK_CLOSES[:-1])


THINK = MappingProxyType(  # --think -> its prompts, as RWKV-7 G1 was trained; models before g1h know minimal, not off
    {
        "off": ThinkMode("", " <think></think"),
        "minimal": ThinkMode("", " <think>\n</think"),
        "on": ThinkMode("", " <think"),
        "low": ThinkMode(" (think a bit)", " <think"),
        "medium": ThinkMode(" (think)", " <think"),
        "high": ThinkMode(" (think a lot)", " <think"),
    }
)
EFFORTS = MappingProxyType({"none": "off", "xhigh": "high", "max": "high"})  # of reasoning_effort, beside THINK's modes
ENABLED = MappingProxyType({True: "on", False: "off"})  # enable_thinking -> the mode
LEADS = MappingProxyType(  # the mode of an answer, None for a text -> its beginning that is not shown
    {None: re.compile(""), "": re.compile(r"\s*")}
    | {name: re.compile("" if mode.thinks else r"\s*>?\s*") for name, mode in THINK.items()}
)
LENGTHS = tuple(THINK[mode].words for mode in ("low", "medium", "high"))
EMPTY = re.compile(r" ?<think(>\s*</think)?>?\s*$")
THINKING = ("reasoning_content", "reasoning", "thinking")  # fields of the thinking, if the answer's words have none
ONLY_CALLS = ("function_call", "tool_call")  # roles of turns that only call tools, in ShareGPT's form
SPEAKERS = MappingProxyType(  # the role of a turn -> the speaker's name in RWKV World chats
    dict.fromkeys(("user", "human"), "User")
    | dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "ai"), "Assistant")
    | dict.fromkeys(("system", "developer"), "System")
    | dict.fromkeys(("tool", "function", "observation", "tool_response"), "Tool")
    | dict.fromkeys(ONLY_CALLS, "Assistant")
)
TEXT_PARTS = ("text", "input_text", "output_text")  # the types of the parts of a content that are texts
REASONING, CALL = "reasoning", "tool_call"  # types of further parts in rows of LLaMA-Factory v1
CALL_PART, RESULT_PART = "tool_use", "tool_result"  # and in Anthropic's
TRAIN, WEIGHT, LOSS_WEIGHT = "train", "weight", "loss_weight"
SWITCHES = (WEIGHT, TRAIN, "training", "loss")  # fields of a turn that switch it off in the loss, by tools' names
PARTLY = ("train_detail", "mask", "masked")  # fields that do so for parts of a turn, which is not supported
# (texts that may open the turn behind an answer, the text that opens the answer)
KNOWN = ((("User:", "System:", "Tool:"), "Assistant:"), (("Question:",), "Answer:"), (("Instruction:",), "Response:"))


@dataclass(frozen=True)
class ChatLayout:
    """The layout of a chat: think ("" or a mode of THINK) opens its answers, of rows by "on" or "off"; clean removes
    blank lines from all other turns; tools stand in it as in tool_form."""

    think: str = ""
    clean: bool = True
    tool_form: ToolForm = TOOL_FORMS[G1]

    def cleaned(self, words: str) -> str:
        """Words of a user, a system or a tool, without blank lines and without space at their ends if `clean`. Words
        that begin as a result of a tool are quoted."""
        if not self.clean:
            return words
        words = re.sub(r"\n{2,}", "\n", words.replace("\r\n", "\n")).strip()
        forged = bool(self.tool_form.result) and words.startswith(self.tool_form.result.rstrip())
        return f"{QUOTE}{words}" if forged else words

    def chat(self, turns: object) -> list[Segment]:
        """The segments of turns {role, content} or {from, value}. Answers count unless their turn switches that off.

        The blank line behind an answer and the next speaker's name count, too: both together end the answer, because a
        blank line alone may separate two paragraphs (stops_of). They are segments of their own, so that the blank line
        is the token that runtimes expect, for any last word."""
        if not isinstance(turns, list) or not turns:
            raise UserError("messages must be a list of turns, each with role and content (or from and value)")
        parts: list[Segment] = []
        before = ""  # the speaker of the turn before
        for turn in ordered(joined_calls([part for whole in turns for part in parts_apart(whole)])):
            if not isinstance(turn, dict):
                raise UserError(f"a turn is {json_kind(turn)}, not an object with role and content")
            speaker, words = self.spoken(turn)
            learned_before = bool(parts) and parts[-1][1]
            if before == speaker == "Assistant" and role_of(turn).lower() in ONLY_CALLS:
                parts[-1] = (f"{parts[-1][0]}\n{words}", learned_before)
                continue
            if before == "Assistant":
                parts.append((TURN_END, learned_before))
            elif parts:
                parts[-1] = (parts[-1][0] + TURN_END, False)
            if speaker == "Assistant":
                opening, rest = self.answer(words, turn)
                parts += [(f"{speaker}:{opening}", False), (rest, is_learned(turn))]
            else:
                parts += [(f"{speaker}:", learned_before), (f" {words}", False)]
            before = speaker
        return parts

    def spoken(self, turn: Mapping[str, Any]) -> tuple[str, str]:
        """(speaker, words) of a turn; calls are among an assistant's words, tools among a system's."""
        name = "content" if "role" in turn else "value"
        speaker = speaker_of(role_of(turn)) if "role" in turn or "from" in turn else ""
        refuse_media(turn)
        form = self.tool_form
        calls, tools = form.called(turn), form.listed(turn)
        if not speaker or (name not in turn and not calls):
            raise UserError(f"a turn has the fields {field_names(turn)}; it needs role and content, or from and value")
        for more, due, what in ((calls, "Assistant", "calls a tool"), (tools, "System", "lists tools")):
            if more and speaker != due:
                raise UserError(f"a turn of role {role_of(turn)!r} {what}, which only the {due.lower()} does")
        if role_of(turn).lower() in ONLY_CALLS:
            return speaker, calls or form.calls_text(turn[name])
        words = "" if calls and turn.get(name) is None else words_of(turn, name).strip()
        words = words if speaker == "Assistant" else self.cleaned(words)
        if speaker == "Tool":
            return form.speaker, f"{form.result}{words}".rstrip()
        return speaker, "\n".join(filter(None, (words, calls, tools)))

    def answer(self, words: str, row: Mapping[str, Any]) -> tuple[str, str]:
        """(the opening of an answer behind "Assistant:", the text that the model continues it with). With think "on"
        that is the thinking in the words or the row's fields, if there is any."""
        if not self.think:
            return "", f" {words.strip()}"
        thinking, answer = split_thinking(words, row)
        if self.think == "off":
            return THINK["off"].opening, f">\n{answer}"
        if not (thinking or "").strip():
            return "", f" {answer}"
        return THINK["on"].opening, f">{thinking}</think>\n{answer}"

    def prompt(self, turns: Sequence[Mapping[str, Any]], tools: object = None) -> list[str]:
        """The texts of turns, with tools, and of the opening of the answer to them, or of its beginning if the last
        turn is the assistant's."""
        begun = begins_answer(turns[-1])
        if begun and self.think:
            raise UserError("think: the last message has begun the answer already; leave think out")
        due = [*with_length(turns, self.think), *([] if begun else [{"role": "assistant", "content": ""}])]
        if tools:
            first = due.pop(0) if SPEAKERS.get(role_in(due[0])) == "System" else {"role": "system", "content": ""}
            own = next(filter(None, map(first.get, LISTS)), None)
            due.insert(0, {**first, LISTS[0]: [*functions_of(own), *functions_of(tools)]})
        texts = [text for text, _ in ChatLayout("", self.clean, self.tool_form).chat(due)]
        if not begun:
            texts.pop()
        return [*texts[:-1], texts[-1] + (THINK[self.think].opening if self.think else "")]

    def question(self, words: str, system: str = "", tools: object = None) -> list[str]:
        """The texts of a user's turn and of the opening of the answer, behind a system text and tools, if any."""
        first = [{"role": "system", "content": system}] if system.strip() else []
        return self.prompt([*first, {"role": "user", "content": words}], tools)


CHAT = ChatLayout()  # the default one


def split_thinking(words: str, row: Mapping[str, Any]) -> tuple[str | None, str]:
    """Split an answer -> (thinking or None, answer); without marks the thinking is in a field of its row. Raises
    UserError for a <think> without an end."""
    words = words.strip()
    if words.startswith("<|begin_of_thought|>"):
        marked = THOUGHT_AND_SOLUTION.fullmatch(words)
        if not marked:
            raise UserError(
                "an answer opens <|begin_of_thought|> and closes no thought and solution; leave the row out"
            )
        return f"\n{marked[1].strip()}\n", marked[2].strip()
    if words.startswith(THINK_OPENS):
        thinking, closing, answer = words.removeprefix(THINK_OPENS).partition(THINK_CLOSES)
        if not closing:
            raise UserError("an answer opens <think> and has no </think>; close it, or leave the row out")
        return thinking, answer.strip()
    found = next((row[name] for name in THINKING if isinstance(row.get(name), str)), None)
    return found and f"\n{found.strip()}\n", words


def with_length(turns: Sequence[Mapping[str, Any]], think: str) -> list[Mapping[str, Any]]:
    """Turns {role, content}, of which the last user's ends in the words of a mode, if it ends in none of LENGTHS."""
    found, words = list(turns), THINK[think].words if think else ""
    asked = [place for place, turn in enumerate(turns) if SPEAKERS.get(role_in(turn)) == "User"]
    if words and asked and turns[asked[-1]].get("content"):
        said = words_of(turns[asked[-1]], "content").rstrip()
        if said and not said.endswith(LENGTHS):
            found[asked[-1]] = {**turns[asked[-1]], "content": said + words}
    return found


def shown_opening(think: str) -> str:
    """The end of the prompt that is shown as the beginning of an answer in this mode."""
    return THINK[think].opening.lstrip() if think and THINK[think].thinks else ""


def role_in(turn: Mapping[str, Any]) -> str:
    """The role of a turn in lower case, "" without one."""
    return str(turn.get("role", turn.get("from", ""))).lower()


def begins_answer(turn: Mapping[str, Any]) -> bool:
    """True if a turn is the assistant's and has words and no calls, so that it may be an answer's beginning."""
    speaker = SPEAKERS.get(role_in(turn))
    return speaker == "Assistant" and bool(turn.get("content")) and not turn.get(CALLS[0])


def role_of(turn: Mapping[str, Any]) -> str:
    """The role of a turn that has one."""
    return field(turn, "role" if "role" in turn else "from")


def speaker_of(role: str) -> str:
    """The speaker's name of a role. Raises UserError for an unknown role."""
    if role.lower() not in SPEAKERS:
        raise UserError(f"role {short(role)!r}; known are {', '.join(SPEAKERS)}")
    return SPEAKERS[role.lower()]


def parts_apart(turn: Any) -> list[Any]:
    """A turn with its parts of reasoning and its calls as fields of their own, as in rows of LLaMA-Factory v1 and of
    Anthropic's; results of tools among its parts are turns before it."""
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(content, list):
        return [turn]
    found: dict[str, list[Any]] = {"text": [], REASONING: [], CALL: [], CALL_PART: [], RESULT_PART: []}
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        found[kind if isinstance(kind, str) and kind in found else "text"].append(part)
    thinking = "".join(map(part_text, found[REASONING]))
    calls = [parsed(part_text(part), "a call of a tool") for part in found[CALL]]
    calls += [{**part, "arguments": part.get("input")} for part in found[CALL_PART]]
    results = [
        {"role": "tool", "content": part.get("content") or "", "tool_call_id": part.get("tool_use_id")}
        for part in found[RESULT_PART]
    ]
    fields = {THINKING[0]: thinking, CALLS[0]: calls}
    rest = turn | {"content": found["text"]} | {name: value for name, value in fields.items() if value}
    return [*results, *([rest] if found["text"] or not results else [])]


def joined_calls(turns: Sequence[Any]) -> list[Any]:
    """Turns, with one in place of several in a row that only call tools."""
    found = list[Any]()
    for turn in turns:
        role, name = ("role", "content") if isinstance(turn, dict) and "role" in turn else ("from", "value")
        alike = [each for each in (*found[-1:], turn) if isinstance(each, dict) and name in each]
        if len(alike) == 2 and all(str(each.get(role)).lower() in ONLY_CALLS for each in alike):
            calls = [call for each in alike for call in as_list(parsed(each[name], "a call of a tool"))]
            found[-1] = {**found[-1], name: calls}
        else:
            found.append(turn)
    return found


def words_of(turn: Mapping[str, Any], name: str) -> str:
    """The words in a turn's field: a text, or a list of parts with texts to join."""
    content = turn[name]
    if content is None:
        raise UserError(f"field {name!r} of a turn is null; give it the turn's words, or leave the turn out")
    return "".join(map(part_text, content)) if isinstance(content, list) else field(turn, name)


def part_text(part: object) -> str:
    """The text of one part of a turn's content. Raises UserError for a part that is no text, such as an image."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise UserError(f"a part of a turn's content is {json_kind(part)}, not a text or an object with a type")
    kind = part.get("type", TEXT_PARTS[0])
    if kind not in (*TEXT_PARTS, REASONING, CALL):
        raise UserError(
            f"a part of a turn's content has the type {short(str(kind))!r}, and an RWKV model reads only texts "
            '({"type": "text", "text": …}); leave such rows out, or write that part out as text'
        )
    name = next((name for name in ("text", "value") if name in part), None)
    if name is None:
        raise UserError(
            f"a part of a turn's content, of the type {kind!r}, has the fields {field_names(part)}; it needs a text "
            "(or a value, as in LLaMA-Factory's rows)"
        )
    return field(part, name)


def is_learned(turn: Mapping[str, Any]) -> bool:
    """True if an answer counts: no field of SWITCHES is 0 or false, nor its loss_weight 0. Raises UserError for other
    values, because only whole rows have other weights, and for a field of PARTLY."""
    for name in PARTLY:
        if turn.get(name) not in (*NOTHING, False):
            raise UserError(
                f"field {name!r} of a turn is not followed; a turn counts as a whole, or with {TRAIN!r} false not at "
                "all, and rows of segments may count in parts"
            )
    for name in SWITCHES:
        found = turn.get(name)
        if found not in (None, 0, 1):
            raise UserError(
                f"field {name!r} of a turn holds {quoted(found)}; 0 leaves its words out of the loss, and 1 does "
                "not; any other weight is for the whole row, beside its turns"
            )
        if found is not None and not found:
            return False
    return turn.get(LOSS_WEIGHT) != 0


def opens_thinking(parts: Sequence[Segment]) -> bool:
    """True if an answer in these segments opens with a thinking, laid out with think "on"."""
    return any(text.endswith(THINK["on"].opening) for text, counts in parts if not counts)


def opening_within(text: str) -> str:
    """The opening of an answer in a text of questions and answers in a known layout, "" for any other text."""
    begins = text.lstrip()
    return next((last for openings, last in KNOWN if begins.startswith(openings) and TURN_END + last in text), "")


def stops_of(prompt: str) -> tuple[str, ...]:
    """The texts that end the answer to a prompt in a known layout, recognized by its last words; () for any other."""
    end = EMPTY.sub("", prompt).rstrip()
    openings = next((openings for openings, last in KNOWN if end.endswith(last)), ())
    return tuple(TURN_END + opening for opening in openings)
