"""An argument parser that raises UserError, so that a command prints one message and exits with 2, and types of flags,
which raise ArgumentTypeError."""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise, takewhile
from typing import Any, NoReturn, TypeVar

from .errors import short
from .names import AUTO
from .rules import Given, Refusals, Rule, contradictions, in_one, notes

MOST = 1 << 48  # the largest count of a flag: sums and products of such numbers fit in what counts them
Value = TypeVar("Value")
FLAG = re.compile(r"--?[^-\s.\d]\S*$")  # a flag, but not a negative number


def counted(number: int, noun: str) -> str:
    """ "1 epoch", "2 epochs"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults that are neither empty nor 0, True as 1, and as a flag's value TEXT without a type, else N."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is True:
            return f"{action.help} (default: 1)"
        return action.help if action.default in (None, "", False, []) else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "TEXT" if action.type is None else "N"


def unknown_flag(flag: str, known: Iterable[str], synonyms: Mapping[str, str], otherwise: str) -> str:
    """The refusal of a flag or word that is not among `known`. Its remedy is this command's flag by `synonyms` {flag:
    this command's}, else the nearest known flag, else `otherwise`."""
    meant = synonyms.get("--" + flag[2:].replace("-", "_")) if flag.startswith("--") else None
    if meant:
        return f"there is no {short(flag)} here; it is {meant}"
    names = {name.lstrip("-"): name for name in known}  # two dashes would make short names alike
    near = difflib.get_close_matches(flag.lstrip("-"), names, 1)
    return f"there is no {short(flag)}; " + (f"did you mean {names[near[0]]}?" if near else otherwise)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports all mistaken flags at once, in one UserError.

    Flags are never abbreviated. The refusal of an unknown flag names this command's flag by `synonyms` {flag: this
    command's}, else the nearest flag; for an unknown value, the words of `values` {(flag, value): words}, else the
    nearest choice. The refusal of a second value of a flag that takes one ends with that flag's remedy in `several`.
    Flags are checked by `rules`, which are notes in their help too; facts(namespace) are {fact: its value}, which holds
    if that is true, and so does the command's own name.
    """

    def __init__(
        self,
        synonyms: Mapping[str, str] | None = None,
        values: Mapping[tuple[str, str], str] | None = None,
        several: Mapping[str, str] | None = None,
        rules: Sequence[Rule] = (),
        facts: Callable[[argparse.Namespace], Mapping[str, Any]] = lambda namespace: {},
        **options: Any,
    ) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.synonyms, self.values, self.several = synonyms or {}, values or {}, several or {}
        self.rules, self.facts = rules, facts
        self.mistakes: list[str] = []

    def error(self, message: str) -> NoReturn:
        """Raise a UserError of the mistakes so far and of this one, after which argparse cannot go on."""
        raise in_one([*self.mistakes, f"{message}; see {self.prog} --help"])

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        self.check_rules(self.rules)
        namespace, refusals = self.parse_with_mistakes(args, namespace)
        refusals.raise_all()
        return namespace

    def check_rules(self, rules: Sequence[Rule]) -> None:
        """Add the rules on each flag to its help."""
        told = notes(rules)
        for action in self._actions:
            if action.dest in told:
                action.help = f"{action.help}{told[action.dest]}"

    def given(self, namespace: argparse.Namespace) -> Given:
        """Collect the input of rules: all flags and facts, and the names of flags that are not their defaults, and of
        facts that hold."""
        flags = {action.dest: action.default for action in self._actions if action.dest in namespace}
        facts = {self.prog: True, **self.facts(namespace)}
        values = {name: getattr(namespace, name) for name in flags}
        names = {name for name, value in values.items() if value != flags[name]}
        tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return Given({**tuples, **facts}, names | {fact for fact, holds in facts.items() if holds})

    def parse_with_mistakes(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, Refusals]:
        """Parse -> (namespace, Refusals of mistaken flags and of those that break a rule). The namespace holds the
        defaults of mistaken flags."""
        args = list(sys.argv[1:] if args is None else args)
        words = [argument.partition("=") for argument in takewhile(lambda argument: argument != "--", args)]
        given = [flag for flag, _, _ in words]
        unknown = [flag for flag in given if FLAG.match(flag) and flag not in self._option_string_actions]
        self.mistakes = [self.unknown(flag) for flag in unknown]
        for flag, _, value in words:
            if FLAG.match(flag) and value == "--":  # argparse would remove it, and leave an empty list as the value
                raise in_one([*self.mistakes, f"{flag}=--: -- is no value; a name that is just that is given as ./--"])
        helps = {"-h", "--help"} & set(given)  # --help shows which flags are required
        required = [action for action in self._actions if action.required and not helps]
        for action in required:  # argparse would stop at a missing one
            action.required = False
        try:
            namespace, rest = self.parse_known_args(args, namespace)
        finally:
            for action in required:
                action.required = True
        if rest and not unknown:  # these may be the values of an unknown flag
            self.mistakes.append(self.stray(args, rest[0]))
        refusals = Refusals(self.mistakes)  # a flag that these name is not told as missing
        for action in required:
            if getattr(namespace, action.dest, None) in (None, []):
                refusals.add(f"{name_of(action)} is missing; see {self.prog} --help")
        refusals = Refusals(refusals.messages)  # rules on a flag that is mistaken or missing say nothing more
        refusals.add(*contradictions(self.rules, self.given(namespace)))
        return namespace, refusals

    def stray(self, args: list[str], word: str) -> str:
        """The refusal of a word that belongs to no flag."""
        for flag, value in pairwise(args):
            action = self._option_string_actions.get(flag)
            if value == word and action is not None and action.nargs == 0:
                return (
                    f"{flag} takes no value, and {value} follows it; leave {value} out, or leave out both if {flag} is "
                    "not wanted"
                )
        return self.too_many(args, word) or self.unknown(word.split("=")[0])

    def too_many(self, args: list[str], word: str) -> str:
        """The refusal of a word that follows the one value of a flag, "" if it does not follow one."""
        for position, flag in enumerate(args):
            action = self._option_string_actions.get(flag)
            values = list(takewhile(lambda value: not FLAG.match(value), args[position + 1 :]))
            if action is not None and action.nargs is None and word in values[1:]:
                remedy = self.several.get(flag, "leave all but one out")
                return f"{flag} takes one value, and {' '.join(map(short, values))} follow it; {remedy}"
        return ""

    def unknown(self, flag: str) -> str:
        """The refusal of an unknown flag or word."""
        otherwise = f"see {self.prog} --help"
        if re.match("-[^-]", flag):
            otherwise += f"; a name that begins with a dash is given as ./{flag}"
        return unknown_flag(flag, self._option_string_actions, self.synonyms, otherwise)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as error:
            self.mistakes.append(f"{error}; see {self.prog} --help")
            return action.default

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            meant = [self.values[flag, value] for flag in action.option_strings if (flag, value) in self.values]
            near = difflib.get_close_matches(str(value), [str(choice) for choice in action.choices or ()], 1)
            if meant:
                error.message += f"; {meant[0]}"
            elif near:
                error.message += f"; did you mean {near[0]}?"
            raise


def name_of(action: argparse.Action) -> str:
    """The name of an argument on the command line."""
    return "/".join(action.option_strings) or str(action.metavar or action.dest)


def codec(text: str) -> str:
    """Read the name of an encoding of texts."""
    try:
        "a".encode(text or "utf-8")
    except (LookupError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is no encoding of texts, such as gb18030") from None
    return text.lower()


def switch(text: str) -> bool:
    """Read 0 / 1, as RWKV-LM's scripts write them, true / false, or yes / no."""
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither 0 nor 1")


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{short(text)!r} is not a whole number") from None


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def constrained(read: Callable[[str], Value], holds: Callable[[Value], object], wrong: str) -> Callable[[str], Value]:
    """Make an argparse type for values that `read` reads and for which a condition holds; else they are `wrong`."""

    def checked(text: str) -> Value:
        value = read(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{short(text)} {wrong}")
        return value

    return checked


def up_to(most: int, read: Callable[[str], int]) -> Callable[[str], int]:
    """Make an argparse type for numbers that `read` reads and that are at most `most`."""
    return constrained(read, lambda value: value <= most, f"is above {most:,}")


count = up_to(MOST, constrained(whole, lambda value: value >= 0, "is negative"))
positive = up_to(MOST, constrained(whole, lambda value: value >= 1, "is below 1"))
seed = constrained(whole, lambda value: -(2**63) <= value < 2**63, "does not fit in 64 bits")
not_negative = constrained(finite, lambda value: value >= 0, "is negative")
above_zero = constrained(finite, lambda value: value > 0, "is not above 0")
below_one = constrained(not_negative, lambda value: value < 1, "must be below 1")
open_share = constrained(above_zero, lambda value: value < 1, "must be below 1")
share = constrained(not_negative, lambda value: value <= 1, "is no share, which is from 0 to 1, as 0.9 for 90 %")
port = constrained(
    whole, lambda value: 0 <= value <= 65535, "is no port, which is a number from 0 (any free one) to 65535"
)
stop_text = constrained(str, bool, "is an empty text, which would stop before the first token; leave it out")


def add_stop_flag(add: Callable[..., object], text: str) -> None:
    """Add --stop, texts that end an answer, to a parser by its `add`; text is the flag's help."""
    add("--stop", type=stop_text, nargs="+", default=[], metavar="TEXT", help=text)


def rate(text: str) -> float | str:
    """Read a learning rate, or AUTO, for one that is chosen."""
    return text if text == AUTO else not_negative(text)


def names(text: str) -> tuple[str, ...]:
    """Read names: one word, a list with commas, or the JSON list that RWKV-PEFT's scripts write, whole or in pieces."""
    return tuple(re.findall(r"[^\s,\[\]\"']+", text))


def alias(aliases: Iterable[tuple[str, str]]) -> Callable[[str], str]:
    """Make an argparse type that turns other tools' names, (theirs, ours), into ours."""
    return lambda text: dict(aliases).get(text, text)
