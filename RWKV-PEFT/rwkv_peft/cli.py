"""An argument parser whose refusals are UserErrors, so that a command says one thing and exits with 2."""

import argparse
import difflib

from .errors import UserError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something, and N for a flag that takes a number."""

    def _get_help_string(self, action):
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
            raise UserError(f"there is no {flag}" + (f"; did you mean {near[0]}?" if near else f"; see {self.prog} --help"))
        return namespace
