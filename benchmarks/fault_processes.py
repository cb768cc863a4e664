"""Processes forked to be killed, and the files that they leave: what faults.py and the files beside it share."""

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
    """The process, forked from this one, that calls action(*arguments), whose result is its exit code; it kills itself
    before its `operation`-th file operation in `folder`, counted from 1, where that is not 0."""
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
    renaming, removing, linking, making folders. Writing itself, and the files that libraries open by themselves, it
    does not see: those lie between two operations, and kills at random moments meet them."""
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
    """Let the permissions of files mean to root what they mean to others."""
    versions, none = ((ctypes.c_uint32 * len(values))(*values) for values in CAPABILITIES)
    if ctypes.CDLL(None).capset(versions, none):
        raise OSError("this system keeps root's privileges")


def is_below(path, place):
    """Whether a path, a name within an open folder, or an open file's number is of the folder `place`."""
    if isinstance(path, int):
        return False
    path = os.fsdecode(path)
    return not os.path.isabs(path) or Path(path).is_relative_to(place)


def ended(process):
    """The exit code of a process; below 0 the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def content(folder):
    """{name: bytes} of a folder's files, hidden ones among them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shown(files):
    """Those of {name: bytes} that a user sees."""
    return {name: data for name, data in files.items() if not name.startswith(".")}
