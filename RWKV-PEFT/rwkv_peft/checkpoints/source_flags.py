"""The flags that name adapters, and facts that their files may lack; adapters.py reads the files. It imports no torch,
for --help."""

import argparse
import os
from typing import Any

from ..cli.names import LARGEST_SCALE, is_scale
from ..cli.parser import alias, constrained, finite
from ..config import forms
from ..config.adapter import MODE_ALIASES

factor = constrained(
    constrained(finite, bool, "would leave nothing of the change; give another number, or leave the adapter out"),
    is_scale,
    f"is larger than {LARGEST_SCALE}, the most that a scale may be",
)


class ScaledFiles(argparse.Action):
    """An action that splits a flag's values, FILE or FILE=SCALE: the flag gets the paths (or the only one), and
    `scales` of the namespace the scales, 1.0 for a file without one. A repeated flag of several values appends."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        single = isinstance(values, str)
        paths, scales = zip(*map(self.split, [values] if single else values))
        earlier = () if single else getattr(namespace, self.dest) or ()
        setattr(namespace, self.dest, paths[0] if single else [*earlier, *paths])
        namespace.scales = [*(namespace.scales if earlier else ()), *scales]

    def split(self, text: str) -> tuple[str, float]:
        """(path, scale) of a value. A text that is the name of a file, or has no number at its end, is a path."""
        path, equals, number = text.rpartition("=")
        try:
            float(number)
        except ValueError:
            return text, 1.0
        if not equals or os.path.exists(text):
            return text, 1.0
        try:
            return path, factor(number)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from error


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for facts that an adapter's file may lack, the same for every command that takes an adapter."""
    parser.set_defaults(scales=())
    parser.add_argument(
        "--bone_mode",
        type=alias(MODE_ALIASES),
        choices=forms("bone"),
        help="variant of a .bone file that does not record it; bat is bat-in, as in RWKV-PEFT",
    )
    parser.add_argument("--lora_alpha", type=finite, help="alpha of an RWKV-PEFT LoRA file, which does not record it")
    parser.add_argument("--lora_init", metavar="PTH", help="init_pissa.pth of an RWKV-PEFT PiSSA file")
