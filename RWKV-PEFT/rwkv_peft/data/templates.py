"""Rows of people's files -> the text of a document, and which parts of it count in the loss.

A document is a list of segments (text, counts): counts says whether the model learns to produce
that text. The layouts are the ones that RWKV World models were trained on.
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ..errors import UserError
from ..files.readable import require_readable
from ..names import SYSTEM_FIELDS
from .thinking import OPENINGS, answered, without_opening

FORMS = (
    "text; messages or conversations; query and response; question and answer; instruction, input "
    "and output; prompt and completion"
)
ANSWERED = (  # the fields of the forms of which answers alone count
    ("messages",),
    ("conversations",),
    ("query", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("prompt", "completion"),
)
Segment = tuple[str, bool]  # a text, and whether it counts in the loss

# what a row or a turn may hold besides, for which the layouts have no place
UNPLACED = ("tools", "tool_calls", "functions", "function_call", "history")
TURN_END = "\n\n"  # token 261 of the World vocabulary
# (what may open the turn behind an answer, what opens the answer)
LAYOUTS = ((("User:", "System:", "Tool:"), "Assistant:"), (("Question:",), "Answer:"), (("Instruction:",), "Response:"))


class UnknownForm(UserError):
    """A row has none of the fields that are looked for."""


def segments(row: object, think: str = "") -> list[Segment]:
    """A row (dict) -> [(text, counts)]; UserError where it has no form that is known. think ("", "on", "off") is how
    answers of a chat are opened (thinking.py)."""
    if not isinstance(row, dict):
        raise UserError(f"a row is {type(row).__name__}, not an object with fields such as {FORMS}")
    if "text" in row and not think:
        answered_too = next((names for names in ANSWERED if all(row.get(name) for name in names)), None)
        if row["text"] and answered_too:
            raise UnknownForm(
                f"a row has a text, of which all counts, beside {' and '.join(answered_too)}, of which the answers do, "
                "and either may be meant; name the field text, give a template for the others, such as instruction, or "
                "leave one of them out of the rows"
            )
        if not answered_too:
            return [(field(row, "text"), True)]
    for name in ("messages", "conversations"):
        if name in row:
            return behind_system(row, chat(row[name], think))
    for question, answer in (("query", "response"), ("question", "answer")):
        if question in row and answer in row:
            return named_segments(row, (question, answer), think)
    if think:
        raise UserError(
            "thinking stands before the answers of chats (messages, or query and response), and this row has the "
            f"fields {', '.join(map(str, row)) or '(none)'}; leave the flag out for such rows"
        )
    if "instruction" in row and "output" in row:
        extra = field(row, "input") if row.get("input") else ""
        prompt = f"Instruction: {field(row, 'instruction')}\n\n" + (f"Input: {extra}\n\n" if extra else "")
        return behind_system(row, exchange(prompt + "Response:", field(row, "output")))
    if "prompt" in row and "completion" in row:
        refuse_unplaced(row)
        if system_of(row):
            raise UnknownForm(
                "a row has a system text beside its prompt, which is laid out as it stands, with no place for that; "
                "fields that are named are laid out as a chat, which has one"
            )
        return [(field(row, "prompt"), False), (field(row, "completion"), True)]
    if "chosen" in row and "rejected" in row:
        raise UserError("a row has a chosen and a rejected answer, which train.py --data_type pairs learns from")
    raise UnknownForm(f"a row has the fields {', '.join(map(str, row)) or '(none)'}; known are {FORMS}")


def system_of(row: Mapping[str, Any]) -> str:
    """The system text beside a question, "" where a row has none."""
    name = next((name for name in SYSTEM_FIELDS if row.get(name)), None)
    return field(row, name).strip() if name else ""


def refuse_unplaced(holder: Mapping[str, Any]) -> None:
    """UserError where a row or a turn holds one of UNPLACED, which would be lost."""
    for name in UNPLACED:
        if holder.get(name) not in (None, "", [], {}, "[]", "{}", "null"):
            remedy = "earlier turns belong into messages" if name == "history" else "write it out in the turns' words"
            raise UserError(
                f"field {name!r} holds what no layout has a place for; {remedy}, or remove the field where it is not "
                "to be learned"
            )


def behind_system(row: Mapping[str, Any], parts: list[Segment]) -> list[Segment]:
    """The system text of a row before its segments, unless they begin with one. Raises UserError for a row of which
    something else would be lost."""
    refuse_unplaced(row)
    words = system_of(row)
    if not words or parts[0][0].startswith("System:"):
        return parts
    return [(f"System: {words}{TURN_END}", False), *parts]


def named_segments(row: object, names: Sequence[str], think: str = "") -> list[Segment]:
    """A row whose text is in the field names[0], or whose prompt and answer are in names[0] and names[1]; think as in
    segments."""
    if not isinstance(row, dict):
        raise UserError(f"a row is {type(row).__name__}, not an object with the fields {', '.join(names)}")
    for name in names:
        if name not in row:
            raise UnknownForm(f"field {name!r} is missing; the row has {', '.join(map(str, row)) or '(none)'}")
    if len(names) > 2 or (len(names) == 1 and think):
        due = "one is a text, two are a prompt and its answer" + (", which thinking needs" if think else "")
        raise UserError(f"{len(names)} fields named; {due}")
    if len(names) == 1:
        return [(field(row, names[0]), True)]
    opening, rest = answered(field(row, names[1]), row, think)
    return behind_system(row, [(f"User: {field(row, names[0])}\n\nAssistant:{opening}", False), (rest, True)])


# Layouts by name, for --template; see Template for the signs.
TEMPLATES = MappingProxyType(
    {
        "chat": "User: {query}\n\nAssistant:[[ {response}]]",
        "question": "Question: {question}\n\nAnswer:[[ {answer}]]",
        "instruction": "Instruction: {instruction}\n\nResponse:[[ {output}]]",
        "input": "Instruction: {instruction}\n\nInput: {input}\n\nResponse:[[ {output}]]",
        "think": "User: {query}\n\nAssistant: <think[[>\n{reasoning}\n</think>\n{response}]]",
        "no-think": "User: {query}\n\nAssistant: <think></think[[>\n{response}]]",
    }
)


def read_template(path: str) -> str:
    """The text of a template: one of TEMPLATES by its name, or a file's, without the newline at its end.

    Raises UserError where it is missing or wrong.
    """
    if path in TEMPLATES:
        return TEMPLATES[path]
    missing = f"--template {path}: no such file, and no layout of that name; named are {', '.join(TEMPLATES)}"
    try:
        text = require_readable(path, missing).read_text(encoding="utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--template {path} is not UTF-8 (byte {error.start}); convert it") from error
    Template(text)
    return text


class Template:
    """A text with {field} where a row's field goes; what stands in [[ ]] counts in the loss.

    For instance "Q: {question} A:[[ {answer}]]". Without any [[ ]] everything counts.
    """

    def __init__(self, text: str) -> None:
        parts = re.split(r"(\[\[|\]\])", text)
        if parts[1::2] != ["[[", "]]"] * (len(parts) // 4):
            raise UserError(f"template {text!r}: each [[ needs its ]], one pair after the other")
        if not re.search(r"\{\w+\}", text):
            raise UserError(f"template {text!r}: names no {{field}}")
        self.parts = [(part, len(parts) == 1 or i % 4 == 2) for i, part in enumerate(parts) if i % 2 == 0 and part]

    def __call__(self, row: object) -> list[Segment]:
        if not isinstance(row, dict):
            raise UserError(f"a row is {type(row).__name__}, not an object with fields")

        def value(match: re.Match[str]) -> str:
            if match[1] not in row:
                raise UserError(
                    f"field {match[1]!r} of the template is missing; the row has {', '.join(map(str, row))}"
                )
            return field(row, match[1])

        return [(re.sub(r"\{(\w+)\}", value, part), counts) for part, counts in self.parts]


def field(row: Mapping[str, Any], name: str) -> str:
    """row[name], which must be text."""
    value = row[name]
    if not isinstance(value, str):
        raise UserError(f"field {name!r} holds {type(value).__name__}, not text")
    return value


def exchange(prompt: str, answer: str) -> list[Segment]:
    """A prompt, not learned, and its answer, learned."""
    return [(prompt, False), (" " + answer.strip(), True)]


def thinks(parts: Sequence[Segment]) -> bool:
    """Whether thinking opens an answer of these segments, which "on" laid out."""
    return any(text.endswith(OPENINGS["on"]) for text, counts in parts if not counts)


def question(words: str, think: str = "") -> list[str]:
    """A user's turn and the opening of the answer, as the texts that `chat` makes of them."""
    turns = ({"role": "user", "content": words}, {"role": "assistant", "content": ""})
    *texts, opening = (text for text, counts in chat(list(turns)) if not counts)
    return [*texts, opening + OPENINGS.get(think, "")]


def stops_of(prompt: str) -> tuple[str, ...]:
    """The texts that end the answer of a prompt in a layout that is known, by its last words; () for any other."""
    asked = without_opening(prompt).rstrip()
    openings = next((openings for openings, last in LAYOUTS if asked.endswith(last)), ())
    return tuple(TURN_END + opening for opening in openings)


def chat(messages: object, think: str = "") -> list[Segment]:
    """Turns {role, content} or {from, value}: the assistant's words count, the others' do not; think as in segments.

    The blank line behind an assistant's turn counts too, and who speaks then: with both the model says that it is done,
    where a blank line alone may part two paragraphs (stops_of). They are no part of what stands before them, so that
    the blank line is the token that runtimes know, whatever the words end in.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list of turns, each with role and content (or from and value)")
    parts: list[Segment] = []
    for turn in messages:
        if not isinstance(turn, dict):
            raise UserError(f"a turn is {type(turn).__name__}, not an object with role and content")
        keys = ("role", "content") if "role" in turn else ("from", "value")
        if not all(key in turn for key in keys):
            raise UserError(
                f"a turn has the fields {', '.join(map(str, turn))}; it needs role and content, or from and value"
            )
        refuse_unplaced(turn)
        role, words = speaker(field(turn, keys[0])), field(turn, keys[1]).strip()
        answered_before = bool(parts) and parts[-1][1]
        if answered_before:
            parts.append((TURN_END, True))
        elif parts:
            parts[-1] = (parts[-1][0] + TURN_END, False)
        if role == "Assistant":
            opening, rest = answered(words, turn, think)
            parts += [(f"{role}:{opening}", False), (rest, True)]
        else:
            parts += [(f"{role}:", answered_before), (f" {words}", False)]
    return parts


def speaker(role: str) -> str:
    """The name that RWKV World chats give to a role."""
    names = {
        "user": "User",
        "human": "User",
        "assistant": "Assistant",
        "gpt": "Assistant",
        "model": "Assistant",
        "bot": "Assistant",
        "system": "System",
        "tool": "Tool",
        "function": "Tool",
    }
    if role.lower() not in names:
        raise UserError(f"role {role!r}; known are {', '.join(names)}")
    return names[role.lower()]
