"""Merge adapters into a base model: `python merge_bone.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "RWKV-PEFT"))

from rwkv_peft.errors import exit_on_user_error  # noqa: E402
from rwkv_peft.release.merge_command import main  # noqa: E402

if __name__ == "__main__":
    exit_on_user_error(main)
