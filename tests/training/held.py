"""train.py that takes no more steps than a file says, as long as it is there: `python held.py FILE flag…`.

Tests hold a run by it while they do what must not come after the run's end, however fast that is. Ranks that it starts
are held too.
"""

import sys
import time
from contextlib import suppress
from pathlib import Path

from rwkv_peft.cli.commands import run
from rwkv_peft.training.ranks import group


def held(argv, file, steps):
    """A command that trains as train.py's `argv` does, but takes no more than so many steps while `file` is there."""
    file.write_text(str(steps))
    return [argv[0], __file__, str(file), *argv[2:]]


def main(file):
    from rwkv_peft.training import loop

    take_step = loop.take_step

    def wait(run, step, *others):
        with suppress(FileNotFoundError):
            while step >= int(file.read_text() or 0):
                time.sleep(0.01)
        return take_step(run, step, *others)

    loop.take_step = wait
    group.python_command = lambda package, name, *argv: [sys.executable, __file__, str(file), *argv]
    run("train")


if __name__ == "__main__":
    main(Path(sys.argv.pop(1)))
