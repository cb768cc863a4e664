"""The layouts of rows: turns -> documents, each a list of segments (text, counts), as RWKV World models were trained.

forms.py says which turns a row has. Here they become documents: texts, chats, pairs of answers, labelled answers,
prompts, and questions with a context. A Template lays out any other fields.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType
from typing import Any

from ..checkpoints.readable import read_short, require_readable
from ..cli.errors import UserError, field_names
from ..cli.names import HERMES
from .chat import CHAT, KNOWN, TURN_END, ChatLayout, Segment
from .dialogues import untagged, written_turns
from .fields import (
    LISTS,
    Row,
    UnknownForm,
    field,
    refuse_unplaced,
    require_field,
    require_object,
    shown,
    unknown,
    without,
)
from .forms import (
    ANSWER,
    ANSWERS,
    CALLED,
    CHATS,
    COMPLETION,
    CONTEXT,
    FORMS,
    KNOWN_FORMS,
    OPENAI,
    Form,
    conversation,
    form_of,
    is_answer,
    label_field,
    question_of,
    sides_of,
    system_of,
    turns_before,
    turns_of,
    unrolled,
    with_turns,
)

PAIRS = (
    "chosen and rejected, each a text or turns (role and content), behind a prompt, query, question or instruction "
    "(and input), or behind messages; chosen_messages and rejected_messages; input, preferred_output and "
    "non_preferred_output, as OpenAI has them; or two dialogues"
)
LABELS = (
    "label (true or false) beside a prompt and its completion, a query and response, a question and answer, an "
    "instruction and output; beside messages that end in the answer; or beside messages, or a list as prompt, and a "
    "completion behind them"
)
PROMPTS = (
    "a prompt, query, question or instruction (and input), or messages; an answer beside them is not read, but by what "
    "judges the model's"
)
CONTEXTS = (
    "context beside a question and answer, a query and response, an instruction and output, a prompt and completion, "
    "or messages"
)
# think -> an answer to lay out in place of the model's
STAND_IN = MappingProxyType({"": ".", "off": ".", "on": "<think>.</think>."})
# --template -> the text of a Template
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


@dataclass(frozen=True)
class RowLayout(ChatLayout):
    """The layout of rows: as chats, and of the named `fields`, or of those that are recognized if none are named.
    turns_in_text makes chats of texts and questions that hold turns."""

    fields: tuple[str, ...] = ()
    turns_in_text: bool = False

    def segments(self, row: object) -> list[Segment]:
        """The segments of a row of text, which counts, or of questions and answers; then only answers count."""
        row = self.with_history(require_object(row, ", ".join(self.fields) or KNOWN_FORMS))
        if self.fields:
            return self.named(row, *self.fields)
        form = form_of(row, self.think)
        if form is not None:
            return self.formed(row, form)
        if self.think and form_of(row):
            raise UserError(
                "only answers of chats (messages, or query and response) open with a thinking, and this row has the "
                f"fields {field_names(row)}; leave the flag out for such rows"
            )
        raise unknown(row, f"known are {KNOWN_FORMS}")

    def chat(self, turns: object) -> list[Segment]:
        """As of any chat, with tools that the words of turns list in the tags of HERMES in tool_form."""
        return super().chat(turns if self.tool_form.name == HERMES else untagged(turns))

    def formed(self, row: Row, form: Form) -> list[Segment]:
        """The segments of a row of a form."""
        if form.layout == "plain":
            return form.turns(row)
        if form.layout == "instruction":
            return self.instruction(row, *form.turns(row))
        if form.layout == "question":
            return self.answered(row, *form.fields)  # in half of the time that its two turns take
        return self.placed(row, self.chat(form.turns(row)))

    def with_history(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.fields:
            return row
        return unrolled(dict(with_turns(row)) if self.turns_in_text else row)

    def named(self, row: dict[str, Any], *names: str) -> list[Segment]:
        """The segments of a row's text or turns, in the field names[0], of a prompt and its answer, in two, or of a
        form, by all of its fields."""
        for name in names:
            require_field(row, name)
        if self.turns_in_text and len(names) < 3 and (chat := with_turns(row, *names)) is not row:
            return self.turns_in(chat, CHATS[0])
        if len(names) == 1 and isinstance(row.get(names[0]), list):
            return self.turns_in(row, names[0])
        if len(names) > 2 and (
            form := next((form for form in FORMS if {*form.fields, *form.beside} == {*names}), None)
        ):
            return self.formed(row, form)
        if len(names) > 2 or (len(names) == 1 and self.think):
            rule = "one is a text, two are a prompt and its answer" + (", which thinking needs" if self.think else "")
            raise UserError(f"{len(names)} fields named; {rule}")
        return self.answered(row, *names) if len(names) == 2 else [(field(row, names[0]), True)]

    def turns_in(self, row: Row, name: str) -> list[Segment]:
        """The segments of the turns in a row's field."""
        return self.placed(row, self.chat(turns_of(row, name)))

    def answered(self, row: Row, question: str, answer: str) -> list[Segment]:
        """The segments of a question and an answer, in two fields, as in a chat. An answer may be true or false."""
        said = json.dumps(row[answer]) if isinstance(row[answer], bool) else field(row, answer)
        opening, rest = self.answer(said, row)
        words = self.cleaned(field(row, question).strip())
        return self.placed(row, [(f"User: {words}\n\nAssistant:{opening}", False), (rest, True)])

    def instruction(self, row: Row, words: str, more: str, answer: str) -> list[Segment]:
        more = self.cleaned(more)
        prompt = f"Instruction: {self.cleaned(words)}\n\n" + (f"Input: {more}\n\n" if more else "")
        return self.placed(row, [(f"{prompt}Response:", False), (f" {answer.strip()}", True)])

    def placed(self, row: Row, parts: list[Segment]) -> list[Segment]:
        """Segments behind the row's system text, unless they begin with one, with its tools in that turn. Raises
        UserError if another field of the row would be lost."""
        listing = next(filter(row.get, LISTS), "")
        tools, begins = self.tool_form.listed(row), parts[0][0].startswith("System:")
        words = "" if begins else self.cleaned(system_of(row))
        refuse_unplaced(row, listing)
        if not tools or (begins and tools in parts[1][0]):
            return [(f"System: {words}{TURN_END}", False)] * bool(words) + parts
        if begins:
            words, parts = parts[1][0].strip(), parts[2:]
        return [("System:", False), (" " + "\n".join(filter(None, (words, tools))) + TURN_END, False), *parts]

    def pair(self, row: object) -> list[list[Segment]]:
        """The segments of a row's better and of its worse answer, each behind the prompt."""
        row = self.with_history(require_object(row, PAIRS))
        if self.fields:
            prompt, *names = self.fields
            return [self.named(row, prompt, name) for name in names]
        sides = sides_of(row)
        if not sides:
            raise unknown(row, f"pairs are {PAIRS}; rows of one answer are for --data_type sft")
        if sides == OPENAI and isinstance(row.get("input"), dict):
            row = {**row["input"], **{side: row[side] for side in sides}}
        answers = [row[side] if isinstance(row.get(side), list | dict) else field(row, side) for side in sides]
        before = turns_before(row)
        if before is not None or not all(isinstance(answer, str) for answer in answers):
            better, worse = (conversation(row, before, answer) for answer in answers)
        elif prompt := question_of(row):
            rest = without(row, *sides, "text")
            return [self.segments(rest | {ANSWERS[prompt]: answer}) for answer in answers]
        else:
            better, worse = map(written_turns, answers)
            if not better or not worse:
                raise UnknownForm(f"a row has no prompt, only {shown(row)}; pairs are {PAIRS}")
        shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(better, worse)))
        shared -= better == worse  # pairs of equal answers are counted as such
        return [self.placed(row, self.behind(one, shared)) for one in (better, worse)]

    def labelled(self, row: object) -> list[Segment]:
        """The segments of a prompt and a labelled answer; of a chat only the last answer counts."""
        row = self.with_history(require_object(row, LABELS))
        label = label_field(row, self.fields)
        if label not in row:
            raise unknown(row, f"labelled rows have {LABELS}; rows without a label are for --data_type sft")
        if self.fields:
            return self.named(row, *self.fields[:2])
        before = turns_before(row)
        if before is None and not isinstance(row.get(COMPLETION), list | dict):
            return self.segments(without(row, label))
        turns = conversation(row, before, row[COMPLETION]) if COMPLETION in row else before or []
        if len(turns) < 2 or not is_answer(turns[-1]):
            raise UserError("the turns of a labelled row are to end in one of the assistant's, which the label judges")
        return self.placed(row, self.behind(turns, len(turns) - 1))

    def behind(self, turns: list[Any], shared: int) -> list[Segment]:
        """The segments of turns; the first `shared` do not count."""
        before = len(self.chat(turns[:shared])) if shared else 0
        return [(text, counts and place >= before) for place, (text, counts) in enumerate(self.chat(turns))]

    def opened(self, row: object) -> list[Segment]:
        """The segments of a row's prompt, up to the opening of its answer; none counts. think "on" opens every answer
        with a thinking. Raises UserError for an empty prompt."""
        row, words = self.with_history(require_object(row, PROMPTS)), STAND_IN[self.think]
        turns = None if self.fields else turns_before(row)
        question = question_of(row)
        if self.fields:
            name = self.fields[0]
            parts = self.named(require_field(row, name) | {"": words}, name, "")
        elif turns is not None:
            before = turns[:-1] if turns and is_answer(turns[-1]) else turns
            parts = self.placed(row, self.chat([*before, {"role": "assistant", "content": words}]))
        elif question:
            rest = without(row, "text")
            parts = self.segments(rest if form_of(rest) is CALLED else rest | {ANSWERS[question]: words})
        else:
            raise unknown(row, f"prompts are {PROMPTS}")
        *prompt, _ = parts
        if not any(text.strip() for text, _ in prompt):
            raise UserError("the prompt is empty; write one, or leave the row out")
        return [(text, False) for text, _ in prompt]

    def in_context(self, row: object) -> list[list[Segment]]:
        """Two documents of a row: its context, which does not count, and its question and answer, which the student
        reads alone. Raises UserError if one of the three has no words."""
        name = self.fields[0] if self.fields else CONTEXT
        row = self.with_history(require_field(require_object(row, CONTEXTS), name))
        rest = without(row, name, "text")
        question = question_of(rest)
        answer = ANSWERS.get(question, "")
        if question and ANSWER in rest and answer != ANSWER:  # an answer by that name goes with any question
            rest = without(rest, ANSWER) | ({} if answer in rest else {answer: row[ANSWER]})
        if not self.fields and not any(key in rest for key in (*CHATS, answer)):
            raise unknown(row, f"rows with contexts have {CONTEXTS}")
        parts = self.named(rest, *self.fields[1:]) if self.fields else self.segments(rest)
        for what, texts in (
            ("context", [field(row, name)]),
            ("question", [text for text, counts in parts if not counts]),
            ("answer", [text for text, counts in parts if counts]),
        ):
            if not any(text.strip() for text in texts):
                raise UserError(f"the {what} is empty; write one, or leave the row out")
        return [[(f"{field(row, name).strip()}{TURN_END}", False)], parts]


class Template:
    """A text with {field} in place of a row's field; the parts in [[ ]] count in the loss.

    For instance "Q: {question} A:[[ {answer}]]". Without any [[ ]] everything counts. In a known chat layout the fields
    that do not count are cleaned.
    """

    def __init__(self, text: str, chat: ChatLayout = CHAT) -> None:
        parts = re.split(r"(\[\[|\]\])", text)
        if parts[1::2] != ["[[", "]]"] * (len(parts) // 4):
            raise UserError(f"template {text!r}: each [[ needs its ]], one pair after the other")
        if not re.search(r"\{\w+\}", text):
            raise UserError(f"template {text!r}: names no {{field}}")
        self.parts = [(part, len(parts) == 1 or i % 4 == 2) for i, part in enumerate(parts) if i % 2 == 0 and part]
        # the words at which answers end, behind an introduction too
        answers = any(f"\n{last}" in "".join(parts[::2]) for _, last in KNOWN)
        self.chat = chat if answers else ChatLayout(clean=False)

    def segments(self, row: object) -> list[Segment]:
        """The segments of a row, its fields filled in."""
        fields = require_object(row, "those of the template")

        def filled(part: str, counts: bool) -> str:
            def value(match: re.Match[str]) -> str:
                words = field(require_field(fields, match[1]), match[1])
                return words if counts else self.chat.cleaned(words)

            return re.sub(r"\{(\w+)\}", value, part)

        return [(filled(part, counts), counts) for part, counts in self.parts]


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
