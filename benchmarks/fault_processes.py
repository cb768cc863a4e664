"""Shared by faults.py and the files beside it: processes forked to be killed, and the files that they leave."""

import contextlib
import ctypes
import io
import itertools
import os
import signal
import sys
import traceback
from pathlib import Path

from rwkv_peft.errors import UserError

REFUSED, FAILED = 2, 3  # exit codes of a process: a UserError, anything else
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
REACHES = (*PROGRAMS, "socket.connect", "socket.getaddrinfo", "urllib.Request")
CAPABILITIES = (0x20080522, 0), (0,) * 6  # of Linux: this version, this process; and none
TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def started(action, *arguments, operation=0, folder=None):
    """Fork a process that calls action(*arguments), whose result is its exit code, and if `operation` is not 0 kills
    itself before its `operation`-th file operation in `folder`, counted from 1."""
    process = os.fork()
    if process:
        return process
    code = 0
    try:
        if operation:
            die_before(operation, folder)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = action(*arguments) or 0
    except UserError:
        code = REFUSED
    except BaseException:  # whatever it is, it is a fault, and this process must end here
        traceback.print_exc()
        code = FAILED
    os._exit(code)


def die_before(operation, folder):
    """Let this process kill itself before so many of Python's changes to the files of a folder: opening one to write,
    renaming, removing, linking, making folders. It does not see writing itself, nor files that libraries open by
    themselves: those are between two operations, and kills at random moments cover them."""
    count, place = itertools.count(1), os.path.realpath(folder)

    def look(event, arguments):
        changes = event in CHANGES or (event == "open" and arguments[2] & TO_WRITE)
        if changes and is_below(arguments[0], place) and next(count) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def hear(tell):
    """Let tell(what) be called with each program that this process starts, and each address that it asks, from now."""

    def look(event, arguments):
        if event in REACHES:
            tell(f"{event} {arguments}")

    sys.addaudithook(look)


def drop_privileges():
    """Let permissions of files bind root as they bind others."""
    versions, none = ((ctypes.c_uint32 * len(values))(*values) for values in CAPABILITIES)
    if ctypes.CDLL(None).capset(versions, none):
        raise OSError("this system keeps root's privileges")


def is_below(path, place):
    """True if a path, a name within an open folder, or an open file's number is in the folder `place`."""
    if isinstance(path, int):
        return False
    path = os.fsdecode(path)
    return not os.path.isabs(path) or Path(path).is_relative_to(place)


def ended(process):
    """The exit code of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def content(folder):
    """{name: bytes} of a folder's files, including hidden ones."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shown(files):
    """Those of {name: bytes} that a user sees."""
    return {name: data for name, data in files.items() if not name.startswith(".")}
