"""The forms of rows: the fields that recognize a form, and a function of a row to its turns. FORMS has those of single
rows; EXPORTS (exports.py) those of whole files of a program.

The reader of rows, the messages and the guide are made of it. layouts.py lays turns out as text, and columns.py finds a
question and an answer in the rows of files that have no form of this table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

from ..cli.errors import UserError, quoted
from ..cli.names import SYSTEM_FIELDS
from .chat import LOSS_WEIGHT, THINKING, TRAIN, Segment, speaker_of
from .dialogues import written_turns
from .fields import LISTS, NOTHING, ROLES, Row, UnknownForm, field, holds, refuse_unplaced, without
from .tools import as_list, parsed

CHATS = ("messages", "conversations")
TURNS = (*CHATS, "conversation", "prompt")  # fields that may hold turns
# further names of such a field, in rows that have none of CHATS and no text
TURN_LISTS = ("dialogue", "dialog", "turns", "chat", "items")
INSTRUCTION = "systemInstruction"  # beside Gemini's contents
# names of the field of a turn's words, the common ones first
WORDS_NAMES = ("content", "value", "text", "parts")
CONTEXT, COMPLETION, ANSWER, HISTORY = "context", "completion", "answer", "history"
LABELLED = ("label", "kto_tag")  # fields of a label; the second is LLaMA-Factory's
# the field of a question -> the field of its answer
ANSWERS = MappingProxyType({"query": "response", "question": "answer", "instruction": "output", "prompt": "completion"})
OPENAI = ("preferred_output", "non_preferred_output")  # beside an input, which holds messages and tools
SIDES = (("chosen", "rejected"), OPENAI, ("chosen_messages", "rejected_messages"))  # the better and the worse answer
# fields of two turns in one object, as Firefly and ms-swift have them, and Capybara
EXCHANGES = (("human", "assistant"), ("input", "output"))
IN_TURN = ("user", "assistant")
MOST_ROWS_OF_NAMES = 256  # lists of fields whose forms are remembered


@dataclass(frozen=True)
class Form:
    """A form of rows, recognized by its fields, all of them, if it `fits`.

    turns gives a row's turns {role, content}, for the layout "chat", and for "question", which has the text of a chat
    in two segments. For "instruction" it gives the three texts, for "plain" the segments themselves, and for "export"
    the lists of messages of a document; `people` is True if these may be Said. `beside` are fields that the form reads
    if a row has them.
    """

    name: str
    fields: tuple[str, ...]
    turns: Callable[[Row], Any]
    layout: Literal["chat", "question", "instruction", "plain", "export"] = "chat"
    fits: Callable[[Row], Any] = lambda row: True
    beside: tuple[str, ...] = ()
    people: bool = False

    @property
    def thinks(self) -> bool:
        """True if its answers may open with a thinking."""
        return self.layout in ("chat", "question")

    def recognizes(self, row: Any) -> bool:
        return isinstance(row, dict) and all(name in row for name in self.fields) and bool(self.fits(row))


def turns_in(name: str) -> Callable[[Row], Any]:
    return lambda row: turns_of(row, name)


def holds_list(name: str) -> Callable[[Row], bool]:
    return lambda row: isinstance(row.get(name), list)


def holds_texts(name: str) -> Callable[[Row], bool]:
    """True for a row with texts in turn in a field, and in no other but its id."""

    def fits(row: Row) -> bool:
        others = (value for other, value in row.items() if other not in (name, "id"))
        return (
            isinstance(row[name], list)
            and {*map(type, row[name])} == {str}
            and not any(isinstance(value, str) for value in others)
        )

    return fits


def holds_turns(name: str) -> Callable[[Row], bool]:
    """True for a row with turns in a field, and with none in a field of another form."""

    def fits(row: Row) -> bool:
        turns = row[name]
        return (
            isinstance(turns, list)
            and bool(turns)
            and all(isinstance(turn, dict) and all(turn_names(turn)) for turn in turns)
            and not any(map(row.get, (*CHATS, "text")))
        )

    return fits


def turn_names(turn: Mapping[str, Any]) -> tuple[str, str]:
    """The fields of a turn's speaker and of its words, "" for one that it lacks."""
    speaker, words = (
        next((name for name in names if isinstance(turn.get(name), kinds)), "")
        for names, kinds in ((ROLES, str), (WORDS_NAMES, (str, list)))
    )
    return speaker, words


def question_of(row: Row) -> str:
    """The field of a row's question, a key of ANSWERS, "" if it has none."""
    return next((name for name in ANSWERS if name in row), "")


def thinking_of(row: Row) -> dict[str, Any]:
    """The fields of a row that hold a thinking."""
    return {name: row[name] for name in THINKING if name in row}


def asked(question: str) -> Callable[[Row], list[dict[str, Any]]]:
    """The function of a row to the turns of a question and its answer."""
    answer = ANSWERS[question]

    def turns(row: Row) -> list[dict[str, Any]]:
        turn = {"role": "assistant", "content": field(row, answer)} | thinking_of(row)
        return [{"role": "user", "content": field(row, question)}, turn]

    return turns


def called(row: Row) -> list[dict[str, Any]]:
    """The turns of a question and of the calls that answer it, as in xLAM's rows."""
    return [{"role": "user", "content": row["query"]}, {"role": "assistant", "tool_calls": row["answers"]}]


def completed(prompt: str, completion: str) -> Callable[[Row], list[Any]]:
    """Make the function of a row to the turns of its prompt, a list, which do not count, and of its completion."""

    def turns(row: Row) -> list[Any]:
        before = [{**turn, TRAIN: False} if isinstance(turn, dict) else turn for turn in row[prompt]]
        answer = row[completion]
        return [*before, *(answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])]

    return turns


def instructed(row: Row) -> list[Any]:
    """The turns of Gemini's contents, behind the parts of its instruction."""
    system = row.get(INSTRUCTION)
    words = system.get("parts") if isinstance(system, dict) else system
    first = [{"role": "system", "content": words}] if system else []
    return [*first, *turns_of(row, "contents")]


def joined(row: Row) -> list[Segment]:
    """The segments of a prompt that is used as it is, and of its completion."""
    beside = "a system text" if system_of(row) else "tools" * any(map(row.get, LISTS))
    if beside:
        raise UnknownForm(
            f"a row has {beside} beside its prompt, and a prompt is used as it is, alone; if you name the fields, all "
            "is laid out as a chat"
        )
    refuse_unplaced(row)
    return [(field(row, "prompt"), False), (field(row, COMPLETION), True)]


def segments(row: Row) -> list[Segment]:
    """The segments that a row gives itself, {text, train} each; Axolotl's rows call train label."""
    refuse_unplaced(row)
    parts = row["segments"]
    if not isinstance(parts, list) or not parts:
        raise UserError("segments must be a list of objects with text and train")
    found = []
    for part in parts:
        counts = part.get(TRAIN, part.get("label")) if isinstance(part, dict) else None
        if not isinstance(counts, bool) or "text" not in part:
            raise UserError(f"a segment is {quoted(part)}; it needs a text, and train, true or false")
        found.append((field(part, "text"), counts))
    return found


def instruction(row: Row) -> tuple[str, str, str]:
    more = field(row, "input") if row.get("input") else ""
    return field(row, "instruction"), more, field(row, "output")


CALLED = Form(
    "query, tools and answers (calls)",
    ("query", "answers"),
    called,
    fits=lambda row: any(map(row.get, LISTS)),
    beside=LISTS,
)
FORMS = (
    Form("text", ("text",), lambda row: [(field(row, "text"), True)], "plain"),
    *(Form(name, (name,), turns_in(name)) for name in CHATS),
    CALLED,
    Form("query and response", ("query", "response"), asked("query"), "question"),
    Form("question and answer", ("question", "answer"), asked("question"), "question"),
    Form(
        "conversation (exchanges of human and assistant, or input and output)",
        ("conversation",),
        turns_in("conversation"),
        fits=holds_list("conversation"),
    ),
    *(Form(f"{name} (texts in turn)", (name,), turns_in(name), fits=holds_texts(name)) for name in ("data", "dialog")),
    Form("segments", ("segments",), segments, "plain"),
    Form("instruction, input and output", ("instruction", "output"), instruction, "instruction", beside=("input",)),
    *(
        Form(f"{prompt} (turns) and {answer}", (prompt, answer), completed(prompt, answer), fits=holds_list(prompt))
        for prompt, answer in (("prompt", COMPLETION), ("input", "output"))
    ),
    Form(
        "contents (turns, as Gemini's tuning has them)",
        ("contents",),
        instructed,
        fits=holds_turns("contents"),
        beside=(INSTRUCTION,),
    ),
    *(Form(f"{name} (turns)", (name,), turns_in(name), fits=holds_turns(name)) for name in TURN_LISTS),
    Form(
        "prompt and actions (KoboldAI's stories)",
        ("prompt", "actions"),
        lambda row: [
            (field(row, "prompt") + "".join(field({"actions": each}, "actions") for each in row["actions"]), True)
        ],
        "plain",
        fits=holds_list("actions"),
    ),
    Form(
        "prompt and completion",
        ("prompt", COMPLETION),
        joined,
        "plain",
        fits=lambda row: not isinstance(row["prompt"], list),
    ),
)
KNOWN_FORMS = "; ".join(form.name for form in FORMS)


@lru_cache(MOST_ROWS_OF_NAMES)
def named_so(names: tuple[str, ...]) -> tuple[Form, ...]:
    """The forms whose fields are among the names."""
    return tuple(form for form in FORMS if set(form.fields) <= set(names))


def form_of(row: Row, think: str = "") -> Form | None:
    """The form of a row, None if it has none; with `think`, among those that may think. Raises UnknownForm for a row
    that two forms fit."""
    forms = [form for form in named_so(tuple(row)) if (form.thinks or not think) and form.fits(row)]
    if len(forms) < 2:
        return forms[0] if forms else None
    full = [form for form in forms if holds(row, *form.fields)]
    if len(full) > 1:
        first, second, *_ = full
        if first.name == "text":
            what = (
                f"a text, which counts as a whole, and {' and '.join(second.fields)}, of which only the answers count"
            )
        else:
            what = f"the fields of two forms, {first.name}, and {second.name}"
        choices = [[*form.fields, *(name for name in form.beside if name in row)] for form in (first, second)]
        raise UnknownForm(f"a row has {what}, and either may be meant", choices)
    return (full or forms)[0]


def unrolled(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its history of questions and answers, and its own question and answer, as turns."""
    question = next((name for name in ANSWERS if name in row and name != "prompt"), "")
    answer = ANSWERS.get(question, "")
    if row.get(HISTORY) in NOTHING or any(name in row for name in ("text", *CHATS)):
        return row
    if not question or not (answer in row or sides_of(row)):
        return row
    exchanges = parsed(row[HISTORY], f"field {HISTORY!r}")
    if not isinstance(exchanges, list) or not all(isinstance(one, list) and len(one) == 2 for one in exchanges):
        raise UserError(f"field {HISTORY!r} holds {quoted(exchanges)}; it takes a list of [question, answer]")
    more = field(row, "input") if question == "instruction" and row.get("input") else ""
    last = ("\n".join(filter(None, (field(row, question), more))), row.get(answer))
    turns: list[dict[str, Any]] = []
    for question_words, answer_words in (*exchanges, last):
        turns += [{"role": "user", "content": question_words}, {"role": "assistant", "content": answer_words}]
    turns[-1] |= thinking_of(row)
    return without(row, HISTORY, question, answer) | {"messages": turns if answer in row else turns[:-1]}


def turns_of(row: Row, name: str) -> Any:
    """The turns in a row's field, a list or its JSON as text. An object with the fields of one of EXCHANGES is two
    turns, and a list of texts is a user's and an assistant's in turn. A turn's speaker and words may have other names,
    of ROLES and WORDS_NAMES."""
    turns = row[name] if isinstance(row.get(name), list) else parsed(row[name], f"field {name!r}")
    if not isinstance(turns, list):
        return turns
    found = list[object]()
    for place, turn in enumerate(turns):
        pair = next((each for each in EXCHANGES if isinstance(turn, dict) and all(name in turn for name in each)), ())
        pairs = [(role, turn[name]) for role, name in zip(IN_TURN, pair)]
        if isinstance(turn, str):
            pairs = [(IN_TURN[place % 2], turn)]
        elif not pairs and isinstance(turn, dict) and not ("role" in turn and "content" in turn):
            speaker, words = turn_names(turn)
            if speaker and words and (speaker, words) != ("from", "value"):
                turn = without(turn, speaker, words) | {"role": turn[speaker], "content": turn[words]}
        found += [{"role": role, "content": words} for role, words in pairs] if pairs else [turn]
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


def with_turns(row: Row, *names: str) -> Row:
    """The row with the turns in its text, or in its question, as messages; the row itself if there are none. `names`
    are those of its text, or of its question and answer, if it has no form."""
    question = names[0] if names else next(filter(row.__contains__, ("text", *ANSWERS)), "")
    words = row.get(question)
    turns = written_turns(words) if isinstance(words, str) and not any(map(row.get, CHATS)) else []
    answer = "".join(names[1:]) if names else ANSWERS.get(question, "")
    if turns and not turns[-1]["content"]:  # the opening of the answer
        turns.pop()
    if not turns or (answer in row and turns[-1]["role"] == "assistant"):
        return row
    if question == "instruction" and row.get("input"):
        turns[-1]["content"] += f"\n{field(row, 'input')}"
        row = without(row, "input")
    if answer in row:
        turns.append({"role": "assistant", "content": row[answer]} | thinking_of(row))
    return without(row, question, answer) | {"messages": turns}


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
            "train.py --data_type labels learns from both kinds; rename the field if it means something else",
            offers=[("data_type", "labels")],
        )
    sides = sides_of(row)
    if sides and holds(row, *sides) and not named:
        what = f"a row has two answers, {' and '.join(sides)}, which train.py --data_type pairs learns from"
        better = row[sides[0]]
        question = question_of(row)
        alone = [question, sides[0]] if isinstance(better, str) and question else [sides[0]]
        if len(alone) == 2 or (isinstance(better, list) and len(better) > 1):
            raise UnknownForm(f"{what}; or learn from one of them alone", [alone], [("data_type", "pairs")])
        raise UserError(what, offers=[("data_type", "pairs")])
