"""The commands in a process whose engine fails as on a GPU with an error that stays."""

import sys

from rwkv_peft.cli.commands import main
from rwkv_peft.cli.errors import exit_on_user_error
from rwkv_peft.inference.engine import Engine


def step(engine):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …")


if __name__ == "__main__":
    Engine.step = step
    sys.argv[0] = "rwkv-peft"
    exit_on_user_error(main)
