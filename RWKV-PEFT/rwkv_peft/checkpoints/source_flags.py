"""The flags for facts that an adapter's file may lack; adapters.py reads the file. It imports no torch, for --help."""

import argparse

from ..cli.parser import alias, finite
from ..config import forms
from ..config.adapter import MODE_ALIASES


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for facts that an adapter's file may lack, the same for every command that takes an adapter."""
    parser.add_argument(
        "--bone_mode",
        type=alias(MODE_ALIASES),
        choices=forms("bone"),
        help="variant of a .bone file that does not record it; bat is bat-in, as in RWKV-PEFT",
    )
    parser.add_argument("--lora_alpha", type=finite, help="alpha of an RWKV-PEFT LoRA file, which does not record it")
    parser.add_argument("--lora_init", metavar="PTH", help="init_pissa.pth of an RWKV-PEFT PiSSA file")
