"""Lays out a row as the text of a document, and says which parts of it count in the loss.

A document is a list of segments (text, counts): counts says whether the model learns to produce
that text. The layouts are the ones that RWKV World models were trained on.
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ..checkpoints.readable import read_short, require_readable
from ..cli.errors import UserError, field_names, quoted
from ..cli.names import SYSTEM_FIELDS
from .fields import Fields, UnknownForm, fields_of, require_field, unknown
from .tools import LISTS, listed, parsed
from .turns import OPENINGS, TRAIN, TURN_END, Segment, answered, chat, cleaned, field, refuse_unplaced, without_opening

FORMS = (
    "text; segments; messages or conversations; query and response; question and answer; query, tools and answers "
    "(calls); instruction, input and output; prompt and completion; conversation (exchanges of human and assistant)"
)
CHATS = ("messages", "conversations")
ANSWERED = (  # the fields of the forms in which only answers count
    ("segments",),
    *((name,) for name in CHATS),
    ("query", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("prompt", "completion"),
)
EXCHANGE = ("human", "assistant")  # fields of two turns in one object, as Firefly and ms-swift have them
# (texts that may open the turn behind an answer, the text that opens the answer)
LAYOUTS = ((("User:", "System:", "Tool:"), "Assistant:"), (("Question:",), "Answer:"), (("Instruction:",), "Response:"))
# what opens turns in the templates of other models; here it is text like any other
FOREIGN_MARKS = (
    *("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "<｜User｜>", "[INST]"),
    *("### Instruction:", "### Human:", "### User:"),
)


def segments(row: object, think: str = "", clean: bool = True) -> list[Segment]:
    """Lay out a row (dict) as [(text, counts)]; think is how answers of a chat are opened, clean whether the others'
    texts are cleaned (turns.py)."""
    row = fields_of(row, FORMS)
    if "text" in row and not think:
        answered_too = next((names for names in ANSWERED if row.holds(*names)), None)
        if answered_too and row.holds("text"):
            raise UnknownForm(
                f"a row has a text, which counts as a whole, and {' and '.join(answered_too)}, of which only the "
                "answers count, and either may be meant; name the field text, give a template for the others, such as "
                "instruction, or leave one of them out of the rows"
            )
        if not answered_too:
            return [(field(row, "text"), True)]
    for name in CHATS:
        if name in row:
            return behind_system(row, chat(turns_of(row, name), think, clean), clean)
    if "query" in row and "answers" in row and any(map(row.holds, LISTS)):
        turns = [{"role": "user", "content": row["query"]}, {"role": "assistant", "tool_calls": row["answers"]}]
        return behind_system(row, chat(turns, think, clean), clean)
    for question, answer in (("query", "response"), ("question", "answer")):
        if question in row and answer in row:
            return named_segments(row, (question, answer), think, clean)
    if isinstance(row.peek("conversation"), list):
        return behind_system(row, chat(turns_of(row, "conversation"), think, clean), clean)
    if think:
        raise UserError(
            "only answers of chats (messages, or query and response) open with a thinking, and this row has the "
            f"fields {field_names(row)}; leave the flag out for such rows"
        )
    if "segments" in row:
        refuse_unplaced(row)
        return given_segments(row["segments"])
    if "instruction" in row and "output" in row:
        extra = cleaned(field(row, "input"), clean) if row.get("input") else ""
        asked = cleaned(field(row, "instruction"), clean)
        prompt = f"Instruction: {asked}\n\n" + (f"Input: {extra}\n\n" if extra else "")
        answer = field(row, "output").strip()
        return behind_system(row, [(f"{prompt}Response:", False), (f" {answer}", True)], clean)
    if "completion" in row and isinstance(row.peek("prompt"), list):
        before = [{**turn, TRAIN: False} if isinstance(turn, dict) else turn for turn in row["prompt"]]
        answer = row["completion"]
        after = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        return behind_system(row, chat([*before, *after], think, clean), clean)
    if "prompt" in row and "completion" in row:
        if system_of(row):
            raise UnknownForm(
                "a row has a system text beside its prompt, and a prompt is used as it is, without one; if you name "
                "the fields, they are laid out as a chat, which begins with the system text"
            )
        refuse_unplaced(row)
        return [(field(row, "prompt"), False), (field(row, "completion"), True)]
    raise unknown(row, f"known are {FORMS}")


def turns_of(row: Fields, name: str) -> object:
    """The turns in a row's field, a list or its JSON as text; an object with the fields of EXCHANGE is two turns."""
    turns = row[name] if isinstance(row.peek(name), list) else parsed(row[name], f"field {name!r}")
    if not isinstance(turns, list):
        return turns
    found = list[object]()
    for turn in turns:
        both = isinstance(turn, dict) and all(role in turn for role in EXCHANGE)
        found += [{"role": role, "content": turn[role]} for role in EXCHANGE] if both else [turn]
    return found


def system_of(row: Fields) -> str:
    """The system text beside a question, "" if a row has none."""
    name = next((name for name in SYSTEM_FIELDS if row.holds(name)), None)
    return field(row, name).strip() if name else ""


def behind_system(row: Fields, parts: list[Segment], clean: bool = True) -> list[Segment]:
    """Put the system text of a row before its segments, unless they begin with one, and the row's tools into that turn.
    Raises UserError if another field of the row would be lost."""
    tools, begins = listed(row), parts[0][0].startswith("System:")
    words = "" if begins else cleaned(system_of(row), clean)
    refuse_unplaced(row)
    if not tools:
        return [(f"System: {words}{TURN_END}", False)] * bool(words) + parts
    if begins:  # as turns.chat lays it out
        words, parts = parts[1][0].strip(), parts[2:]
    return [("System:", False), (" " + "\n".join(filter(None, (words, tools))) + TURN_END, False), *parts]


def given_segments(parts: object) -> list[Segment]:
    """The segments that a row gives itself, {text, train} each: its texts as they are, and whether they count, which
    Axolotl's rows call label."""
    if not isinstance(parts, list) or not parts:
        raise UserError("segments must be a list of objects with text and train")
    found = []
    for part in parts:
        counts = part.get(TRAIN, part.get("label")) if isinstance(part, dict) else None
        if not isinstance(counts, bool) or "text" not in part:
            raise UserError(f"a segment is {quoted(part)}; it needs a text, and train, true or false")
        found.append((field(part, "text"), counts))
    return found


def named_segments(row: object, names: Sequence[str], think: str = "", clean: bool = True) -> list[Segment]:
    """Lay out a row whose text, or turns, are in the field names[0], or prompt and answer in names[0] and names[1]."""
    row = fields_of(row, ", ".join(names))
    for name in names:
        require_field(row, name)
    if len(names) == 1 and isinstance(row.peek(names[0]), list):
        return behind_system(row, chat(turns_of(row, names[0]), think, clean), clean)
    if len(names) > 2 or (len(names) == 1 and think):
        due = "one is a text, two are a prompt and its answer" + (", which thinking needs" if think else "")
        raise UserError(f"{len(names)} fields named; {due}")
    if len(names) == 1:
        return [(field(row, names[0]), True)]
    opening, rest = answered(field(row, names[1]), row, think)
    words = cleaned(field(row, names[0]).strip(), clean)  # as in a chat
    return behind_system(row, [(f"User: {words}\n\nAssistant:{opening}", False), (rest, True)], clean)


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


def layout_named(name: str, layouts: Mapping[str, str], flag: str = "--template") -> str:
    """The text of one of the layouts by its name, or a file's, without the newline at its end. Raises UserError if
    there is neither, or if the file is not UTF-8."""
    if name in layouts:
        return layouts[name]
    missing = f"{flag} {name}: no such file, and no layout of that name; named are {', '.join(layouts)}"
    try:
        return read_short(require_readable(name, missing)).removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {name} is not UTF-8 (byte {error.start}); convert it") from error


def read_template(path: str) -> str:
    """The text of a Template: one of TEMPLATES by its name, or a file's."""
    Template(text := layout_named(path, TEMPLATES))
    return text


class Template:
    """A text with {field} in place of a row's field; the parts in [[ ]] count in the loss.

    For instance "Q: {question} A:[[ {answer}]]". Without any [[ ]] everything counts. In one of LAYOUTS the fields that
    do not count are cleaned.
    """

    def __init__(self, text: str, clean: bool = True) -> None:
        parts = re.split(r"(\[\[|\]\])", text)
        if parts[1::2] != ["[[", "]]"] * (len(parts) // 4):
            raise UserError(f"template {text!r}: each [[ needs its ]], one pair after the other")
        if not re.search(r"\{\w+\}", text):
            raise UserError(f"template {text!r}: names no {{field}}")
        self.parts = [(part, len(parts) == 1 or i % 4 == 2) for i, part in enumerate(parts) if i % 2 == 0 and part]
        self.clean = clean and bool(opening_within("".join(parts[::2])))

    def __call__(self, row: object) -> list[Segment]:
        fields = fields_of(row, "those of the template")

        def filled(part: str, counts: bool) -> str:
            def value(match: re.Match[str]) -> str:
                return cleaned(field(require_field(fields, match[1]), match[1]), self.clean and not counts)

            return re.sub(r"\{(\w+)\}", value, part)

        return [(filled(part, counts), counts) for part, counts in self.parts]


def thinks(parts: Sequence[Segment]) -> bool:
    """Return whether thinking opens an answer of these segments, which think="on" laid out."""
    return any(text.endswith(OPENINGS["on"]) for text, counts in parts if not counts)


def question(words: str, think: str = "", system: str = "", tools: str = "", clean: bool = True) -> list[str]:
    """The texts that `chat` makes of a system text and tools_text, a user's turn, and the opening of the answer."""
    told = "\n".join(filter(None, (system.strip(), tools)))
    return before_answer([("system", told)] * bool(told) + [("user", words)], think, clean)


def before_answer(turns: Sequence[tuple[str, str]], think: str = "", clean: bool = True) -> list[str]:
    """The texts that `chat` makes of turns (role, words) and the opening of the answer to them."""
    laid_out = chat([{"role": role, "content": content} for role, content in [*turns, ("assistant", "")]], "", clean)
    *texts, opening = (text for text, counts in laid_out if not counts)
    return [*texts, opening + OPENINGS.get(think, "")]


def opening_within(text: str) -> str:
    """The opening of an answer in a text of questions and answers in a known layout, "" for any other text."""
    begins = text.lstrip()
    return next((last for openings, last in LAYOUTS if begins.startswith(openings) and TURN_END + last in text), "")


def stops_of(prompt: str) -> tuple[str, ...]:
    """The texts that end the answer to a prompt in a known layout, recognised by its last words; () for any other."""
    asked = without_opening(prompt).rstrip()
    openings = next((openings for openings, last in LAYOUTS if asked.endswith(last)), ())
    return tuple(TURN_END + opening for opening in openings)
