"""Rows of people's files -> the text of a document, and which parts of it count in the loss.

A document is a list of segments (text, counts): counts says whether the model learns to produce
that text. The layouts are the ones that RWKV World models were trained on.
"""

from ..errors import UserError

FORMS = "text; messages or conversations; query and response; question and answer; instruction, input " \
        "and output; prompt and completion"


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
    raise UserError(f"a row has the fields {', '.join(map(str, row)) or '(none)'}; known are {FORMS}")


def field(row, name):
    """row[name], which must be text."""
    value = row[name]
    if not isinstance(value, str):
        raise UserError(f"field {name!r} holds {type(value).__name__}, not text")
    return value


def exchange(prompt, answer):
    """A prompt, not learned, and its answer, learned."""
    return [(prompt, False), (" " + answer.strip(), True)]


def chat(messages):
    """Turns {role, content} or {from, value}: the assistant's words count, the others' do not."""
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list of turns, each with role and content (or from and value)")
    parts = []
    for turn in messages:
        if not isinstance(turn, dict):
            raise UserError(f"a turn is {type(turn).__name__}, not an object with role and content")
        keys = ("role", "content") if "role" in turn else ("from", "value")
        if not all(key in turn for key in keys):
            raise UserError(f"a turn has the fields {', '.join(map(str, turn))}; it needs role and content, "
                            "or from and value")
        role, words = speaker(field(turn, keys[0])), field(turn, keys[1]).strip()
        gap = "\n\n" if parts else ""
        if role == "Assistant":
            parts += [(f"{gap}{role}:", False), (" " + words, True)]
        else:
            parts.append((f"{gap}{role}: {words}", False))
    return parts


def speaker(role):
    """The name that RWKV World chats give to a role."""
    names = {"user": "User", "human": "User", "assistant": "Assistant", "gpt": "Assistant",
             "model": "Assistant", "bot": "Assistant", "system": "System", "tool": "Tool", "function": "Tool"}
    if role.lower() not in names:
        raise UserError(f"role {role!r}; known are {', '.join(names)}")
    return names[role.lower()]
