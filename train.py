"""Train RWKV-6, or a Bone adapter on it: `python train.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "RWKV-PEFT"))

from rwkv_peft.cli.commands import run  # noqa: E402

if __name__ == "__main__":
    run("train")
