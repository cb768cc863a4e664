"""A run of a comparison as a process: it trains as train.py does. When the comparison is killed, it saves and stops."""

import os
import signal

from ...children import when_parent_ends
from ...cli.errors import exit_on_user_error

if __name__ == "__main__":
    when_parent_ends(lambda: os.kill(os.getpid(), signal.SIGTERM))
    from ...training.run import main

    exit_on_user_error(main)
