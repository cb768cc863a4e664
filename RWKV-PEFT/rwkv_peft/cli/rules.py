"""Rules on which flags go together, as data, and the refusals of a command line, gathered to be reported at once.

A condition reads as people write flags: "--compile" holds if that flag is given, "--loss_mask qa|se" if its value is
one of these (of several values: if any is), "--peft !none" if it is another. Any other text is the name of a fact,
shown with its value unless that is True. Refusals of a command line and the notes in its help come from the rules.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from .errors import UserError, short

FLAG = re.compile(r"--[A-Za-z]\w*")


class Refusals:
    """Gathers messages. A message that names a flag of the `earlier` messages is left out: a flag that was refused
    there was read as if it had not been given, and that may contradict the rest."""

    def __init__(self, earlier: Sequence[str] = ()) -> None:
        self.earlier, self.messages = flags_in(earlier), list(earlier)

    def add(self, *messages: str) -> None:
        self.messages += [message for message in messages if not flags_in([message]) & self.earlier]

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Add the message of a UserError that ends the block. What follows the block is judged, too."""
        try:
            yield
        except UserError as error:
            self.add(str(error))

    def raise_all(self) -> None:
        """Raise one UserError of all messages, if there are any."""
        if self.messages:
            raise in_one(self.messages)


def in_one(messages: Iterable[str]) -> UserError:
    """The UserError of all messages: one message as it is, several as a list."""
    lines = list(dict.fromkeys(messages))
    many = (f"{len(lines)} things are wrong with this command:", *(f"- {line}" for line in lines))
    return UserError(*(lines if len(lines) == 1 else many))


def flags_in(messages: Iterable[str]) -> set[str]:
    """The flags that messages name, without --help, which any message may name."""
    return {flag for message in messages for flag in FLAG.findall(message)} - {"--help"}


NEEDS, EXCLUDES = "needs", "does not go with"


class Rule(NamedTuple):
    """Each of `subjects` NEEDS one of `others`, or EXCLUDES each of them: conditions, with ", " between them. The
    refusal ends in `why` and `remedy`."""

    subjects: str
    verb: str
    others: str
    why: str
    remedy: str = ""


class Given(NamedTuple):
    """The input of rules: the values of flags (without their dashes) and of facts, and the names of those that hold."""

    values: Mapping[str, Any]
    names: Collection[str]

    def holds(self, condition: str) -> bool:
        name, wanted = parts_of(condition)
        if not wanted or self.values[name] is None:
            return not wanted and name in self.names
        listed = wanted.removeprefix("!").split("|")
        return any((word in listed) != wanted.startswith("!") for word in words_of(self.values[name]))

    def shown(self, condition: str) -> str:
        """A condition, with the value that its flag or fact has."""
        name, wanted = parts_of(condition)
        if self.values[name] is True and not wanted:
            return condition
        value = short(" ".join(words_of(self.values[name])))
        return f"--{name} {value}" if condition.startswith("--") else f"{name} ({value})"


def contradictions(rules: Sequence[Rule], given: Given) -> Iterator[str]:
    """Yield the refusal of each broken rule; rules on flags that are missing among the values are skipped: these were
    refused already."""
    for rule in rules:
        others = rule.others.split(", ")
        for subject in rule.subjects.split(", "):
            if not all(parts_of(each)[0] in given.values for each in (subject, *others)) or not given.holds(subject):
                continue
            met = list(filter(given.holds, others))
            if rule.verb == EXCLUDES:
                wrong, remedy = list(map(given.shown, met)), rule.remedy or "leave one of them out"
            else:
                wrong, remedy = [] if met else [worded(" or ".join(others))], rule.remedy or "give both, or neither"
            for other in wrong:
                yield f"{given.shown(subject)} {rule.verb} {other}: {rule.why}; {remedy}"


def notes(rules: Sequence[Rule]) -> dict[str, str]:
    """{flag: note for its help} on the flags that it, or one of its values, needs and does not go with."""
    found: dict[str, dict[tuple[str, str], list[str]]] = {}
    for rule in rules:
        others = rule.others.split(", ")
        objects = others if rule.verb == EXCLUDES else [" or ".join(others)]
        pairs = [(subject, other) for subject in rule.subjects.split(", ") for other in objects]
        pairs += [(other, subject) for subject, other in pairs if rule.verb == EXCLUDES]
        verb = "not with" if rule.verb == EXCLUDES else rule.verb
        for own, other in pairs:
            name, wanted = parts_of(own)
            found.setdefault(name, {}).setdefault((wanted.removeprefix("1"), verb), []).append(worded(other))
    return {name: " [" + "; ".join(note(*each) for each in said.items()) + "]" for name, said in found.items()}


def note(case: tuple[str, str], words: Sequence[str]) -> str:
    """The note on one value of a flag: case is (the value, "" for any, and the verb)."""
    wanted, verb = case
    return f"{worded(wanted) + ': ' * bool(wanted)}{verb} {', '.join(dict.fromkeys(words))}"


def parts_of(condition: str) -> tuple[str, str]:
    """(the flag without its dashes, the required values, "" for any); (a fact, "")."""
    name, _, wanted = condition.removeprefix("--").partition(" ")
    return (name, wanted) if condition.startswith("--") else (condition, "")


def worded(condition: str) -> str:
    return condition.replace("|", " or ").replace("!", "other than ")


def words_of(value: Any) -> list[str]:
    """A flag's value as the command line has it."""
    if isinstance(value, tuple):
        return [word for item in value for word in words_of(item)]
    return [f"{value:g}" if isinstance(value, float) else str(int(value)) if isinstance(value, bool) else str(value)]
