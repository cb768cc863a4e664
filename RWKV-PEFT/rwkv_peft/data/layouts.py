"""The layouts of rows: fields -> documents, each a list of segments (text, counts), as RWKV World models were trained.

Rows of texts, questions and answers, chats, pairs of answers, labelled answers, prompts, and questions with a context
are recognized by their fields, unless the fields are named; a Template lays out any others.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType
from typing import Any

from ..checkpoints.readable import read_short, require_readable
from ..cli.errors import UserError, field_names, quoted
from ..cli.names import SYSTEM_FIELDS
from .chat import CHAT, LOSS_WEIGHT, THINKING, TRAIN, TURN_END, ChatLayout, Segment, opening_within, speaker_of
from .fields import (
    LISTS,
    NOTHING,
    Row,
    UnknownForm,
    field,
    holds,
    refuse_unplaced,
    require_field,
    require_object,
    shown,
    unknown,
    without,
)
from .tools import as_list, parsed

FORMS = (
    "text; segments; messages or conversations; query and response; question and answer; query, tools and answers "
    "(calls); instruction, input and output; prompt and completion; conversation (exchanges of human and assistant)"
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
CHATS = ("messages", "conversations")
TURNS = (*CHATS, "conversation", "prompt")  # fields that may hold turns
CONTEXT, COMPLETION, ANSWER, HISTORY = "context", "completion", "answer", "history"
LABELLED = ("label", "kto_tag")  # fields of a label; the second is LLaMA-Factory's
# the field of a question -> the field of its answer
ANSWERS = MappingProxyType({"query": "response", "question": "answer", "instruction": "output", "prompt": "completion"})
# the fields of the forms in which only answers count
ANSWERED = (("segments",), *((name,) for name in CHATS), *ANSWERS.items())
OPENAI = ("preferred_output", "non_preferred_output")  # beside an input, which holds messages and tools
SIDES = (("chosen", "rejected"), OPENAI, ("chosen_messages", "rejected_messages"))  # the better and the worse answer
EXCHANGE = ("human", "assistant")  # fields of two turns in one object, as Firefly and ms-swift have them
DIALOGUE = re.compile(r"(?:^|\n\n)(System|Human|User|Assistant):")  # turns in one text, as Anthropic's HH has them
# think -> an answer to lay out in place of the model's
STAND_IN = MappingProxyType({"": ".", "off": ".", "on": "<think>.</think>."})
# openings of turns in other models' templates; here they are text like any other
FOREIGN_MARKS = (
    *("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "<｜User｜>", "[INST]"),
    *("### Instruction:", "### Human:", "### User:"),
)
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
    """The layout of rows: as chats, and of the named `fields`, or of those that are recognized if none are named."""

    fields: tuple[str, ...] = ()

    def segments(self, row: object) -> list[Segment]:
        """The segments of a row of text, which counts, or of questions and answers; then only answers count."""
        row = self.unrolled(require_object(row, ", ".join(self.fields) or FORMS))
        if self.fields:
            return self.named(row, *self.fields)
        if "text" in row and not self.think:
            both = next((names for names in ANSWERED if holds(row, *names)), None)
            if both and holds(row, "text"):
                raise UnknownForm(
                    f"a row has a text, which counts as a whole, and {' and '.join(both)}, of which only the "
                    "answers count, and either may be meant; name the field text, give a template for the others, such "
                    "as instruction, or leave one of them out of the rows"
                )
            if not both:
                return [(field(row, "text"), True)]
        for name in CHATS:
            if name in row:
                return self.turns_in(row, name)
        if "query" in row and "answers" in row and any(map(row.get, LISTS)):
            turns = [{"role": "user", "content": row["query"]}, {"role": "assistant", "tool_calls": row["answers"]}]
            return self.placed(row, self.chat(turns))
        for question in ("query", "question"):
            if question in row and ANSWERS[question] in row:
                return self.answered(row, question, ANSWERS[question])
        if isinstance(row.get("conversation"), list):
            return self.turns_in(row, "conversation")
        if self.think:
            raise UserError(
                "only answers of chats (messages, or query and response) open with a thinking, and this row has the "
                f"fields {field_names(row)}; leave the flag out for such rows"
            )
        if "segments" in row:
            refuse_unplaced(row)
            return given_segments(row["segments"])
        if "instruction" in row and "output" in row:
            return self.instruction(row)
        if COMPLETION in row and isinstance(row.get("prompt"), list):
            before = [{**turn, TRAIN: False} if isinstance(turn, dict) else turn for turn in row["prompt"]]
            answer = row[COMPLETION]
            after = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
            return self.placed(row, self.chat([*before, *after]))
        if "prompt" in row and COMPLETION in row:
            if system_of(row):
                raise UnknownForm(
                    "a row has a system text beside its prompt, and a prompt is used as it is, without one; if you "
                    "name the fields, they are laid out as a chat, which begins with the system text"
                )
            refuse_unplaced(row)
            return [(field(row, "prompt"), False), (field(row, COMPLETION), True)]
        raise unknown(row, f"known are {FORMS}")

    def unrolled(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its history of questions and answers, and its own question and answer, as turns."""
        question = next((name for name in ANSWERS if name in row and name != "prompt"), "")
        answer = ANSWERS.get(question, "")
        if self.fields or row.get(HISTORY) in NOTHING or any(name in row for name in ("text", *CHATS)):
            return row
        if not question or not (answer in row or sides_of(row)):
            return row
        exchanges = parsed(row[HISTORY], f"field {HISTORY!r}")
        if not isinstance(exchanges, list) or not all(isinstance(one, list) and len(one) == 2 for one in exchanges):
            raise UserError(f"field {HISTORY!r} holds {quoted(exchanges)}; it takes a list of [question, answer]")
        more = field(row, "input") if question == "instruction" and row.get("input") else ""
        last = ("\n".join(filter(None, (field(row, question), more))), row.get(answer))
        turns: list[dict[str, Any]] = []
        for asked, answered in (*exchanges, last):
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        turns[-1] |= {name: row[name] for name in THINKING if name in row}
        return without(row, HISTORY, question, answer) | {"messages": turns if answer in row else turns[:-1]}

    def named(self, row: dict[str, Any], *names: str) -> list[Segment]:
        """The segments of a row's text or turns, in the field names[0], or of a prompt and its answer, in two."""
        for name in names:
            require_field(row, name)
        if len(names) == 1 and isinstance(row.get(names[0]), list):
            return self.turns_in(row, names[0])
        if len(names) > 2 or (len(names) == 1 and self.think):
            due = "one is a text, two are a prompt and its answer" + (", which thinking needs" if self.think else "")
            raise UserError(f"{len(names)} fields named; {due}")
        return self.answered(row, *names) if len(names) == 2 else [(field(row, names[0]), True)]

    def turns_in(self, row: Row, name: str) -> list[Segment]:
        """The segments of the turns in a row's field."""
        return self.placed(row, self.chat(turns_of(row, name)))

    def answered(self, row: Row, question: str, answer: str) -> list[Segment]:
        """The segments of a question and an answer, in two fields, as in a chat."""
        opening, rest = self.answer(field(row, answer), row)
        words = self.cleaned(field(row, question).strip())
        return self.placed(row, [(f"User: {words}\n\nAssistant:{opening}", False), (rest, True)])

    def instruction(self, row: Row) -> list[Segment]:
        more = self.cleaned(field(row, "input")) if row.get("input") else ""
        words = self.cleaned(field(row, "instruction"))
        prompt = f"Instruction: {words}\n\n" + (f"Input: {more}\n\n" if more else "")
        return self.placed(row, [(f"{prompt}Response:", False), (f" {field(row, 'output').strip()}", True)])

    def placed(self, row: Row, parts: list[Segment]) -> list[Segment]:
        """Segments behind the row's system text, unless they begin with one, with its tools in that turn. Raises
        UserError if another field of the row would be lost."""
        listing = next(filter(row.get, LISTS), "")
        tools, begins = self.tool_form.listed(row), parts[0][0].startswith("System:")
        words = "" if begins else self.cleaned(system_of(row))
        refuse_unplaced(row, listing)
        if not tools:
            return [(f"System: {words}{TURN_END}", False)] * bool(words) + parts
        if begins:
            words, parts = parts[1][0].strip(), parts[2:]
        return [("System:", False), (" " + "\n".join(filter(None, (words, tools))) + TURN_END, False), *parts]

    def pair(self, row: object) -> list[list[Segment]]:
        """The segments of a row's better and of its worse answer, each behind the prompt."""
        row = self.unrolled(require_object(row, PAIRS))
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
        elif prompt := next((name for name in ANSWERS if name in row), ""):
            rest = without(row, *sides, "text")
            return [self.segments(rest | {ANSWERS[prompt]: answer}) for answer in answers]
        else:
            better, worse = map(dialogue, answers)
            if not better or not worse:
                raise UnknownForm(f"a row has no prompt, only {shown(row)}; pairs are {PAIRS}")
        shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(better, worse)))
        shared -= better == worse  # pairs of equal answers are counted as such
        return [self.placed(row, self.behind(one, shared)) for one in (better, worse)]

    def labelled(self, row: object) -> list[Segment]:
        """The segments of a prompt and a labelled answer; of a chat only the last answer counts."""
        row = self.unrolled(require_object(row, LABELS))
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
        row, words = self.unrolled(require_object(row, PROMPTS)), STAND_IN[self.think]
        turns = None if self.fields else turns_before(row)
        question = next((name for name in ANSWERS if name in row), "")
        if self.fields:
            name = self.fields[0]
            parts = self.named(require_field(row, name) | {"": words}, name, "")
        elif turns is not None:
            before = turns[:-1] if turns and is_answer(turns[-1]) else turns
            parts = self.placed(row, self.chat([*before, {"role": "assistant", "content": words}]))
        elif question:
            parts = self.segments(without(row, "text") | {ANSWERS[question]: words})
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
        row = self.unrolled(require_field(require_object(row, CONTEXTS), name))
        rest = without(row, name, "text")
        question = next((key for key in ANSWERS if key in rest), "")
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
        self.chat = chat if opening_within("".join(parts[::2])) else ChatLayout(clean=False)

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


def turns_of(row: Row, name: str) -> object:
    """The turns in a row's field, a list or its JSON as text; an object with the fields of EXCHANGE is two turns."""
    turns = row[name] if isinstance(row.get(name), list) else parsed(row[name], f"field {name!r}")
    if not isinstance(turns, list):
        return turns
    found = list[object]()
    for turn in turns:
        both = isinstance(turn, dict) and all(role in turn for role in EXCHANGE)
        found += [{"role": role, "content": turn[role]} for role in EXCHANGE] if both else [turn]
    return found


def turns_before(row: Row) -> list[Any] | None:
    """The turns that a row holds as a list, None if it has none."""
    name = next((name for name in TURNS if isinstance(row.get(name), list)), "")
    found = turns_of(row, name) if name else None
    return found if isinstance(found, list) else None


def conversation(row: Row, before: list[Any] | None, answer: object) -> list[Any]:
    """The turns up to `answer`: a text, a turn, or a list of turns, which is the whole conversation if its first turn
    is not the assistant's."""
    if isinstance(answer, str):
        answer = {"role": "assistant", "content": answer}
    after = answer if isinstance(answer, list) else [answer]
    if after and not is_answer(after[0]):
        return after
    if before and is_answer(before[-1]):
        raise UserError("the turns before the answers end in one of the assistant's; leave it out")
    if before is None and isinstance(row.get("prompt"), str):
        before = [{"role": "user", "content": row["prompt"]}]
    return [*(before or []), *after]


def is_answer(turn: object) -> bool:
    """True if a turn is the assistant's or has no role. Raises UserError for an unknown role."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return not isinstance(role, str) or speaker_of(role) == "Assistant"


def dialogue(text: str) -> list[Any]:
    """The turns of a text in which each begins with its speaker's name; [] for any other text."""
    front, *rest = DIALOGUE.split(text)
    turns = [{"role": role, "content": words} for role, words in zip(rest[::2], rest[1::2])]
    return [] if front.strip() else turns


def given_segments(parts: object) -> list[Segment]:
    """The segments that a row gives itself, {text, train} each; Axolotl's rows call train label."""
    if not isinstance(parts, list) or not parts:
        raise UserError("segments must be a list of objects with text and train")
    found = []
    for part in parts:
        counts = part.get(TRAIN, part.get("label")) if isinstance(part, dict) else None
        if not isinstance(counts, bool) or "text" not in part:
            raise UserError(f"a segment is {quoted(part)}; it needs a text, and train, true or false")
        found.append((field(part, "text"), counts))
    return found


def system_of(row: Row) -> str:
    """The system text beside a question, "" if a row has none."""
    name = next(filter(row.get, SYSTEM_FIELDS), None)
    return field(row, name).strip() if name else ""


def sides_of(row: Row) -> tuple[str, str] | None:
    """The fields of a row's better and worse answer; None if it is no pair."""
    return next((sides for sides in SIDES if sides[0] in row and sides[1] in row), None)


def loss_weight_of(row: Row) -> Any:
    """The loss_weight of the answers in a row that count, None if none has one. Raises UserError if they differ; it is
    1 beside others if a turn has none."""
    found = list[Any]()
    for value in row.values():
        turns = [turn for turn in as_list(value) if isinstance(turn, dict)]
        if any(turn.get(LOSS_WEIGHT) is not None for turn in turns):
            weights = [1 if turn.get(LOSS_WEIGHT) is None else turn[LOSS_WEIGHT] for turn in turns if is_answer(turn)]
            found += [weight for weight in weights if weight != 0]
    first, *others = found or [None]
    if other := next((weight for weight in others if weight != first), None):
        raise UserError(
            f"answers of a row have the loss_weight {quoted(first)} and {quoted(other)}; the answers of a row count "
            "alike, or with 0 not at all; make a row of each weight"
        )
    return first


def label_field(row: Row, fields: Sequence[str]) -> str:
    """The field of a row's label, among a RowLayout's fields."""
    return fields[2] if fields else next((name for name in LABELLED if name in row), LABELLED[0])


def label_of(row: Row, fields: Sequence[str]) -> bool:
    """The label of a row. Raises UserError for anything but true and false."""
    name = label_field(row, fields)
    value = row[name]
    if not isinstance(value, bool):
        raise UserError(
            f"field {name!r} holds {quoted(value)}; a label is true for a desirable answer, or false for an "
            "undesirable one"
        )
    return value


def refuse_compared(row: Row, named: bool = False) -> None:
    """Raise UserError for a row with a label, and for a pair unless its fields are `named`: training on every answer
    alike would learn the bad ones as good ones."""
    if isinstance(label := row.get(label_field(row, ())), bool):
        raise UserError(
            f"a row has the label {str(label).lower()}, and here every answer is learned as a good one; "
            "train.py --data_type labels learns from both kinds; rename the field if it means something else"
        )
    sides = sides_of(row)
    if sides and holds(row, *sides) and not named:
        raise UserError(
            f"a row has two answers, {' and '.join(sides)}, which train.py --data_type pairs learns from; name the "
            "fields to learn from others alone"
        )
