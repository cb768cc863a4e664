"""Runs one command for the page, and records how it ended: a process that outlives the page's server.

    python -m rwkv_peft.tools.ui.job FOLDER COMMAND argument…

The command's output goes to FOLDER/output.txt and its exit code to FOLDER/exit. Signals to this process go to the
command, so that Ctrl-C's end a run after its step.
"""

import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from ...checkpoints.atomic import write_text
from ...checkpoints.lock import hold
from ...children import python_command

OUTPUT, EXIT, LOCK, COMMAND = "output.txt", "exit", ".lock", "command.json"


def main(argv: list[str]) -> int:
    folder, words = Path(argv[0]), argv[1:]
    process: subprocess.Popen[bytes] | None = None
    came, early = list[int](), list[int]()  # signals, and those before the command began

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    signal.signal(signal.SIGINT, forward)
    signal.signal(signal.SIGTERM, forward)
    with hold(folder / LOCK), open(folder / OUTPUT, "ab") as output:
        command = python_command("rwkv_peft", *words)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        for number in early:
            process.send_signal(number)
        code = process.wait()
        if came and code == 1:  # Python itself had not begun, and says no more
            code = -came[-1]
        write_text(folder / EXIT, str(code if code >= 0 else 128 - code))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
