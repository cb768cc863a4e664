"""An argument parser whose refusals are UserErrors, so that a command says one thing and exits with 2; the types of
flags, which raise ArgumentTypeError."""

import argparse
import difflib
import math
import re

from .errors import UserError


def counted(number, noun):
    """ "1 epoch", "2 epochs"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something, those of 0|1 flags as such, and N for a flag that takes a number."""

    def _get_help_string(self, action):
        if action.default is True:
            return f"{action.help} (default: 1)"
        return action.help if action.default in (None, "", False, []) else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return "TEXT" if action.type is None else "N"


class Parser(argparse.ArgumentParser):
    """Flags are never abbreviated; an unknown one is refused with the nearest that exists."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(flag, known, 1)
            raise UserError(
                f"there is no {flag}" + (f"; did you mean {near[0]}?" if near else f"; see {self.prog} --help")
            )
        return namespace


def switch(text):
    """0 / 1, as RWKV-LM's scripts write them, or true / false."""
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither 0 nor 1")


def whole(text):
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def positive(text):
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def finite(text):
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def not_negative(text):
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def above_zero(text):
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def count(text):
    value = whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def names(text):
    """Names as a word, as a list with commas, or as the JSON list that RWKV-PEFT's scripts write, whole or in
    pieces."""
    return tuple(re.findall(r"[^\s,\[\]\"']+", text))


def alias(aliases):
    """An argparse type that reads the names that others use as ours."""
    return lambda text: dict(aliases).get(text, text)


def seed(text):
    value = whole(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} does not fit in 64 bits")
    return value
