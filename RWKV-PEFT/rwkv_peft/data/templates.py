"""Rows of people's files -> the text of a document, and which parts of it count in the loss.

A document is a list of segments (text, counts): counts says whether the model learns to produce
that text. The layouts are the ones that RWKV World models were trained on.
"""

import re
from types import MappingProxyType

from ..errors import UserError
from ..files.readable import require_readable

FORMS = (
    "text; messages or conversations; query and response; question and answer; instruction, input "
    "and output; prompt and completion"
)


TURN_END = "\n\n"
# (what opens a turn, what opens its answer)
LAYOUTS = (("User:", "Assistant:"), ("Question:", "Answer:"), ("Instruction:", "Response:"))


class UnknownForm(UserError):
    """A row has none of the fields that are looked for."""


def segments(row):
    """A row (dict) -> [(text, counts)]; UserError where it has no form that is known."""
    if not isinstance(row, dict):
        raise UserError(f"a row is {type(row).__name__}, not an object with fields such as {FORMS}")
    if "text" in row:
        return [(field(row, "text"), True)]
    for name in ("messages", "conversations"):
        if name in row:
            return chat(row[name])
    for question, answer in (("query", "response"), ("question", "answer")):
        if question in row and answer in row:
            return exchange(f"User: {field(row, question)}\n\nAssistant:", field(row, answer))
    if "instruction" in row and "output" in row:
        extra = field(row, "input") if row.get("input") else ""
        prompt = f"Instruction: {field(row, 'instruction')}\n\n" + (f"Input: {extra}\n\n" if extra else "")
        return exchange(prompt + "Response:", field(row, "output"))
    if "prompt" in row and "completion" in row:
        return [(field(row, "prompt"), False), (field(row, "completion"), True)]
    raise UnknownForm(f"a row has the fields {', '.join(map(str, row)) or '(none)'}; known are {FORMS}")


def named_segments(row, names):
    """A row whose text is in the field names[0], or whose prompt and answer are in names[0] and names[1]."""
    if not isinstance(row, dict):
        raise UserError(f"a row is {type(row).__name__}, not an object with the fields {', '.join(names)}")
    for name in names:
        if name not in row:
            raise UnknownForm(f"field {name!r} is missing; the row has {', '.join(map(str, row)) or '(none)'}")
    if len(names) == 1:
        return [(field(row, names[0]), True)]
    if len(names) != 2:
        raise UserError(f"{len(names)} fields named; one is a text, two are a prompt and its answer")
    return exchange(f"User: {field(row, names[0])}\n\nAssistant:", field(row, names[1]))


# Layouts by name, for --template; see Template for the signs.
TEMPLATES = MappingProxyType(
    {
        "chat": "User: {query}\n\nAssistant:[[ {response}]]",
        "question": "Question: {question}\n\nAnswer:[[ {answer}]]",
        "instruction": "Instruction: {instruction}\n\nResponse:[[ {output}]]",
        "input": "Instruction: {instruction}\n\nInput: {input}\n\nResponse:[[ {output}]]",
    }
)


def read_template(path):
    """The text of a template: one of TEMPLATES by its name, or a file's, without the newline at its end.

    Raises UserError where it is missing or wrong.
    """
    if path in TEMPLATES:
        return TEMPLATES[path]
    missing = f"--template {path}: no such file, and no layout of that name; named are {', '.join(TEMPLATES)}"
    try:
        text = require_readable(path, missing).read_text(encoding="utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--template {path} is not UTF-8 (byte {error.start}); convert it") from error
    Template(text)
    return text


class Template:
    """A text with {field} where a row's field goes; what stands in [[ ]] counts in the loss.

    For instance "Q: {question} A:[[ {answer}]]". Without any [[ ]] everything counts.
    """

    def __init__(self, text):
        parts = re.split(r"(\[\[|\]\])", text)
        if parts[1::2] != ["[[", "]]"] * (len(parts) // 4):
            raise UserError(f"template {text!r}: each [[ needs its ]], one pair after the other")
        if not re.search(r"\{\w+\}", text):
            raise UserError(f"template {text!r}: names no {{field}}")
        self.parts = [(part, len(parts) == 1 or i % 4 == 2) for i, part in enumerate(parts) if i % 2 == 0 and part]

    def __call__(self, row):
        if not isinstance(row, dict):
            raise UserError(f"a row is {type(row).__name__}, not an object with fields")

        def value(match):
            if match[1] not in row:
                raise UserError(
                    f"field {match[1]!r} of the template is missing; the row has {', '.join(map(str, row))}"
                )
            return field(row, match[1])

        return [(re.sub(r"\{(\w+)\}", value, part), counts) for part, counts in self.parts]


def field(row, name):
    """row[name], which must be text."""
    value = row[name]
    if not isinstance(value, str):
        raise UserError(f"field {name!r} holds {type(value).__name__}, not text")
    return value


def exchange(prompt, answer):
    """A prompt, not learned, and its answer, learned."""
    return [(prompt, False), (" " + answer.strip(), True)]


def question(words):
    """A user's turn and the opening of the answer, as the texts that `chat` makes of them."""
    turns = ({"role": "user", "content": words}, {"role": "assistant", "content": ""})
    return [text for text, counts in chat(list(turns)) if not counts]


def stops_of(prompt):
    """The texts that end the answer of a prompt in a layout that is known, by its last words; () for any other."""
    return next(((TURN_END + opening,) for opening, last in LAYOUTS if prompt.rstrip().endswith(last)), ())


def chat(messages):
    """Turns {role, content} or {from, value}: the assistant's words count, the others' do not.

    The blank line behind an assistant's turn counts too: with it the model says that it is done.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list of turns, each with role and content (or from and value)")
    parts = []
    for turn in messages:
        if not isinstance(turn, dict):
            raise UserError(f"a turn is {type(turn).__name__}, not an object with role and content")
        keys = ("role", "content") if "role" in turn else ("from", "value")
        if not all(key in turn for key in keys):
            raise UserError(
                f"a turn has the fields {', '.join(map(str, turn))}; it needs role and content, or from and value"
            )
        role, words = speaker(field(turn, keys[0])), field(turn, keys[1]).strip()
        if parts:
            parts[-1] = (parts[-1][0] + TURN_END, parts[-1][1])
        parts += [(f"{role}:", False), (" " + words, True)] if role == "Assistant" else [(f"{role}: {words}", False)]
    return parts


def speaker(role):
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
