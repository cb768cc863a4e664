"""Questions and answers in rows of no known form: their fields by words that people use, decided once a file.

Fields become those of the form "question and answer". Known forms win: this rule reads only what has none. Choices
beside a question become lettered lines under it, and the answer its letter and text.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from types import MappingProxyType
from typing import Any

from ..cli.errors import UserError, quoted, some
from ..cli.names import SYSTEM_FIELDS, is_whole
from .chat import THINKING
from .fields import NOTHING, Row, UnknownForm, shown, without
from .forms import ANSWERS, CONTEXT, FORMS, LABELLED, SIDES, TURNS, form_of, question_of, unrolled

PEEKED = 100  # rows of a file by which its fields are decided


def folded(name: str) -> str:
    """A field's name without case, spaces and underscores."""
    return re.sub(r"[\s_-]", "", name).casefold()


def folded_words(known: Iterable[str], more: str) -> frozenset[str]:
    """The folded names of fields of known forms, and more words for them."""
    return frozenset((*map(folded, known), *more.split()))


QUESTIONS = folded_words(
    ANSWERS,
    "problem user human q ask request post inputs inputtext userinput userprompt userquestion usermessage "
    "questiontext problemstatement 问题 問題 指令 提问 提問 问 質問 질문",
)
ANSWERING = folded_words(
    ANSWERS.values(),
    "solution target targets assistant bot a reply model gpt answertext outputtext correctanswer finalanswer "
    "bestanswer referenceanswer assistantresponse modelresponse botresponse botanswer "
    "答案 回答 回复 回覆 答 解答 输出 輸出 응답 답변",
)
THOUGHTS = folded_words(THINKING, "cot complexcot chainofthought thought thoughts 思考")
SYSTEMS = folded_words(SYSTEM_FIELDS, "systemmessage 系统 系統")
CONTEXTS = folded_words((CONTEXT,), "passage 背景")
JUDGED = folded_words(LABELLED, "score rating iscorrect correct rejected")
CHOICES = ("choices", "options")
OPTIONAL = (*SYSTEM_FIELDS, *THINKING, "input", CONTEXT)
LETTERS = "ABCDEFGHIJ"
LETTERED = re.compile(r"(?:op(?:tion)?|choice|answer)?_?([a-j])", re.IGNORECASE)  # A, opa, option_a
RIGHT = tuple("answerkey answeridx answerindex cop answer correct correctanswer response output solution label".split())


@dataclass(frozen=True)
class Columns:
    """The fields of a file's rows: names {field: that of a known form}; under these, the field `before` its question
    and `more` behind it, those of its choices, one with all or a field each, and that of the right one."""

    names: Mapping[str, str] = field(default_factory=dict)
    before: str = ""
    more: str = ""
    choices: tuple[str, ...] = ()
    right: str = ""

    def __bool__(self) -> bool:
        """True if rows are read otherwise than by a known form."""
        return bool(self.names or self.choices)

    def __call__(self, row: Any) -> Any:
        """The row with the fields of a known form. Raises UserError for a row that lacks one, and for a question or an
        answer that is no text."""
        if not isinstance(row, dict):
            return row
        for old, new in self.names.items():
            if row.get(old) is None and new not in OPTIONAL:
                rule = f"{old} is to be its {new}, as in the first rows"
                raise UnknownForm(f"a row has the fields {shown(row)}; {rule}")
            if isinstance(row.get(old), list | dict) and new in ("question", "answer"):
                raise UserError(f"field {old!r} holds {quoted(row[old])}, and its {new} is a text")
        result = {self.names.get(name, name): value for name, value in row.items()}
        if self.before or self.more:
            parts = (result.get(self.before), result["question"], result.get(self.more))
            result["question"] = "\n".join(str(part).strip() for part in parts if part not in NOTHING)
        if self.choices and result.get(self.choices[0]) not in NOTHING:
            question = question_of(result)
            if not question:
                raise UnknownForm(f"a row has the fields {shown(row)}; its choices are to stand beside a question")
            lines, answer = chosen(result, self)
            result[question] = "\n".join([str(result[question]).strip(), *lines])
            result = without(result, self.right) | {ANSWERS[question]: answer}
        return without(result, self.before, self.more, *self.choices)

    @property
    def taken(self) -> dict[str, str]:
        """{field: its meaning}, such as question, answer, context, input and choices."""
        parts = {self.before: CONTEXT, self.more: "input", self.right: "answer"} | dict.fromkeys(
            self.choices, "choices"
        )
        return {**self.names, **{name: meaning for name, meaning in parts.items() if name}}

    @cached_property
    def note(self) -> str:
        """The end of a note on the fields."""
        words = [f"{old} as the {new}" for old, new in self.names.items() if old != new]
        words += [f"{self.before} before the question"] * bool(self.before)
        words += [f"{self.more} behind the question"] * bool(self.more)
        if self.choices:
            words.append(f"{', '.join(self.choices)} as choices, of which {self.right} names the right one")
        return "; ".join(words)


KNOWN = Columns()
# folded name -> the field of a known form
FIELDS = MappingProxyType(
    {
        folded(name): name
        for name in (
            *(name for form in FORMS for name in (*form.fields, *form.beside)),
            *(name for sides in SIDES for name in sides),
            *OPTIONAL,
        )
    }
)


def chosen(row: Row, columns: Columns) -> tuple[list[str], str]:
    """(the lettered lines of a row's choices, the right one with its letter)."""
    texts = choice_texts(row, columns.choices)
    value = row.get(columns.right)
    letters = list(texts)
    if isinstance(value, bool) or value is None:
        letter = ""
    elif isinstance(value, int):
        letter = letters[value] if 0 <= value < len(letters) else ""
    else:
        word = str(value).strip()
        bare = word.strip("().:（） ").upper()
        letter = bare if bare in texts else next((each for each, text in texts.items() if text == word), "")
    if not letter:
        raise UserError(
            f"field {columns.right!r} holds {quoted(value)}, which is none of the choices {', '.join(letters)}; it "
            "names one by its letter, its text, or its number from 0 on"
        )
    lines = [f"{each}. {text}" for each, text in texts.items()]
    return lines, f"{letter}. {texts[letter]}"


def choice_texts(row: Row, names: tuple[str, ...]) -> dict[str, str]:
    """{letter: text} of a row's choices. Raises UserError for values that are none."""
    first = row.get(names[0])
    if len(names) > 1:
        pairs = [(name.strip("_")[-1].upper(), row.get(name)) for name in names if row.get(name) not in NOTHING]
    elif isinstance(first, dict) and isinstance(first.get("text"), list):
        labels = first.get("label")
        pairs = list(zip(map(str, labels if isinstance(labels, list) else LETTERS), first["text"]))
    elif isinstance(first, dict):
        pairs = list(first.items())
    else:
        values = first if isinstance(first, list) else []
        pairs = list(zip(LETTERS, values))
        if values and all(isinstance(each, dict) for each in values):
            pairs = [(str(each.get("label", letter)), each.get("text")) for letter, each in zip(LETTERS, values)]
    if len(pairs) < 2 or not all(isinstance(text, str | int | float) for _, text in pairs):
        raise UserError(f"field {names[0]!r} holds {quoted(first)}; choices are two or more texts")
    texts = {letter.upper(): str(text).strip() for letter, text in pairs}
    return {key: re.sub(rf"^\(?{re.escape(key)}[).:]\s*", "", text) for key, text in texts.items()}


def peeked(
    items: Iterator[tuple[str, object]], parse: Callable[[object], Any]
) -> tuple[list[dict[str, Any]], Iterator[tuple[str, object]]]:
    """(the first rows of a file's items of read_rows, all items). Rows that cannot be read are left out."""
    first, rows = list(islice(items, PEEKED)), []
    for _, item in first:
        try:
            row = parse(item) if not isinstance(item, str) else None
        except UserError:
            continue  # the encoder reports it
        if isinstance(row, dict):
            rows.append(row)
    return rows, chain(first, items)


def columns_of(rows: list[dict[str, Any]], kind: str, think: str) -> Columns:
    """The Columns of rows of one file; KNOWN if they have a known form, or none."""
    if not rows or any(known(row, kind) for row in rows):
        refuse_code(rows, kind)
        return multiple_choice(rows, kind) or thoughts(rows, think)
    keys: dict[str, list[str]] = {}
    for name in names_of(rows):
        keys.setdefault(folded(name), []).append(name)
    renamed = {name: FIELDS[key] for key, (name, *_) in keys.items() if key in FIELDS and FIELDS[key] != name}
    like_known = [{renamed.get(name, name): value for name, value in row.items()} for row in rows] if renamed else []
    if like_known and known(like_known[0], kind):
        refuse_twins(keys, renamed)
        return replace(multiple_choice(like_known, kind) or KNOWN, names=MappingProxyType(renamed))
    return by_words(rows, keys, kind)


def names_of(rows: Iterable[Row]) -> list[str]:
    """The names of all fields of rows, each once."""
    return list(dict.fromkeys(name for row in rows for name in row))


def known(row: Row, kind: str) -> bool:
    """True if a row has a form that its kind reads, or holds two."""
    asked = any(name in row for name in (*ANSWERS, *TURNS))
    try:
        if kind == "prompts":
            return asked
        if any(all(side in row for side in sides) for sides in SIDES):
            return kind != "pairs" or asked or not any(folded(name) in QUESTIONS for name in row)
        return kind != "pairs" and form_of(unrolled(dict(row))) is not None
    except UserError:
        return True


def refuse_code(rows: list[dict[str, Any]], kind: str) -> None:
    """Raise UnknownForm for a code beside a text that would be learned without it, as in MBPP's rows."""
    if kind in ("preprocess", "train") and any(row.get("text") and row.get("code") for row in rows):
        raise UnknownForm(
            "a row has a text and a code, and the text alone would be learned", [["text", "code"], ["text"]]
        )


def refuse_twins(keys: Mapping[str, list[str]], names: Iterable[str]) -> None:
    for same in keys.values():
        if len(same) > 1 and any(name in names for name in same):
            raise UnknownForm(f"a row has the fields {' and '.join(same)}, which are one name but for case and spaces")


def by_words(rows: list[dict[str, Any]], keys: Mapping[str, list[str]], kind: str) -> Columns:
    """The Columns by the words for questions and answers."""
    names = names_of(rows)
    asking = [name for key, same in keys.items() for name in same if key in QUESTIONS]
    answering = [name for key, same in keys.items() for name in same if key in ANSWERING]
    if set(keys) & {"b", "c"} or not ("q" in keys and "a" in keys):
        asking = [name for name in asking if folded(name) != "q"]
        answering = [name for name in answering if folded(name) != "a"]
    inputs = keys.get("input", [])
    if not asking and len(inputs) == 1 and "input" in keys:
        asking, inputs = inputs, []
    choices = choice_fields(rows, names) if kind in ("preprocess", "train", "prompts") else ()
    if choices and len(asking) == 1:
        return replace(with_choices(rows, choices), names=MappingProxyType({asking[0]: "question"}))
    needs_answer = kind not in ("prompts", "pairs")
    if not asking or (needs_answer and not answering):
        return KNOWN
    several = [both for both in (asking, answering if needs_answer else []) if len(both) > 1]
    if several:
        what = "the question" if several[0] is asking else "the answer"
        to_name = [[q, a] for q in asking for a in answering] if needs_answer else [[q] for q in asking]
        raise UnknownForm(
            f"a row has the fields {some(names, 20)}, and {' or '.join(several[0])} may be {what}", to_name[:4]
        )
    (question,) = asking
    answer = answering[0] if needs_answer else ""
    refuse_twins(keys, [question, answer])
    if needs_answer:
        refuse_judged(rows, keys, question, answer, kind)
    taken = {question: "question"} | ({answer: "answer"} if answer else {})
    for words, target in ((SYSTEMS, SYSTEM_FIELDS[0]), (THOUGHTS, THINKING[0])):
        same = [name for key, each in keys.items() for name in each if key in words]
        if len(same) == 1 and same[0] not in taken:
            taken[same[0]] = target
    before = next((name for key, each in keys.items() for name in each if key in CONTEXTS), "")
    if kind == "contexts" and before:
        taken, before = taken | {before: CONTEXT}, ""
    return Columns(MappingProxyType(taken), before=before, more=inputs[0] if inputs else "")


def refuse_judged(
    rows: list[dict[str, Any]], keys: Mapping[str, list[str]], question: str, answer: str, kind: str
) -> None:
    """Raise UnknownForm for answers that may be bad ones, or numbers of choices."""
    choices = [[question, answer]]
    judged = [
        name for key, same in keys.items() for name in same if key in JUDGED and same[0] not in (question, answer)
    ]
    if kind != "labels" and judged:
        raise UnknownForm(
            f"a row has the question {question}, the answer {answer}, and {' and '.join(judged)}, by which the answer "
            "may be a bad one",
            choices,
        )
    others = without(rows[0], question, answer).items()
    lists = [name for name, value in others if isinstance(value, list) or LETTERED.fullmatch(name)]
    if lists and any(is_whole(row.get(answer)) for row in rows):
        raise UnknownForm(
            f"a row has the answer {answer}, a number, beside {' and '.join(lists)}, in which it may count", choices
        )


def choice_fields(rows: list[dict[str, Any]], names: list[str]) -> tuple[str, ...]:
    """The fields of choices in rows, () if there are none."""
    for name in names:
        if folded(name) in CHOICES and any(isinstance(row.get(name), list | dict) and row[name] for row in rows):
            return (name,)
    groups: dict[str, list[str]] = {}
    for name in names:
        if match := LETTERED.fullmatch(name):
            groups.setdefault(name[: match.start(1)].casefold(), []).append(name)
    letters = [sorted(each, key=folded) for each in groups.values()]
    ordered = [each for each in letters if [name[-1].upper() for name in each] == list(LETTERS[: len(each)])]
    return tuple(next((each for each in ordered if len(each) > 2), ()))


def multiple_choice(rows: list[dict[str, Any]], kind: str) -> Columns | None:
    """The Columns of rows of a known form with choices beside their question, None if they have none."""
    if kind not in ("preprocess", "train", "prompts"):
        return None
    names = names_of(rows)
    question = next((name for name in ("query", "question") if name in names), "")
    choices = choice_fields(rows, names) if question else ()
    return with_choices(rows, choices) if choices else None


def with_choices(rows: list[dict[str, Any]], choices: tuple[str, ...]) -> Columns:
    """The Columns of a question with choices. Raises UserError if no field names the right one, or if its numbers count
    from 1."""
    names = names_of(rows)
    by_key = {folded(name): name for name in names if name not in choices}
    right = next((by_key[key] for key in RIGHT if key in by_key and names_one(rows, by_key[key], choices)), "")
    if not right:
        raise UserError(
            f"a row has the choices {', '.join(choices)} beside its question, and no field that names the right one by "
            "its letter, its text or its number; write its letter into a field answer"
            + (", or lay the rows out by a template, as --template FILE" if len(choices) > 1 else "")
        )
    if any(is_whole(row.get(right)) and row[right] == len(choice_texts(row, choices)) for row in rows):
        raise UserError(f"field {right!r} counts the choices from 1, and it is to count from 0; write letters instead")
    return Columns(choices=choices, right=right)


def names_one(rows: list[dict[str, Any]], right: str, choices: tuple[str, ...]) -> bool:
    """True if a field names one of its row's choices in most rows."""
    good = 0
    for row in rows:
        try:
            chosen(row, Columns(choices=choices, right=right))
            good += 1
        except UserError:
            value = row.get(right)
            good += isinstance(value, int) and value == len(choice_texts(row, choices))
    return good > len(rows) // 2


def thoughts(rows: list[dict[str, Any]], think: str) -> Columns:
    """The Columns of rows of a known form with a thinking of another name, which `think` asks for."""
    names = names_of(rows) if think == "on" else []
    same = [name for name in names if folded(name) in THOUGHTS and name not in THINKING]
    if len(same) != 1 or any(name in THINKING for name in names):
        return KNOWN
    return Columns(MappingProxyType({same[0]: THINKING[0]}))
