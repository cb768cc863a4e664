"""What systems do in ways of their own: groups of processes, the pipes of children, limits, owners of files, locks that
are only looked at.

Windows has none of these calls. Its halves are checked by mypy alone: nobody has run them yet.
"""

import os
import signal
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


def can_fork() -> bool:
    """True if this process can fork; else its children begin anew."""
    return hasattr(os, "fork")


if sys.platform == "win32":
    import msvcrt
    import subprocess
    from multiprocessing.connection import PipeConnection as End

    import psutil

    PLAIN = 0

    def handing(end: "End[Any, Any]") -> dict[str, Any]:
        os.set_handle_inheritable(end.fileno(), True)
        handles = subprocess.STARTUPINFO(lpAttributeList={"handle_list": [end.fileno()]})
        return {"startupinfo": handles, "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}

    def taken_over(number: int) -> "End[Any, Any]":
        return End(number)

    def read_part(pipe: "End[Any, Any]", most: int) -> bytes:
        with suppress(EOFError):
            return pipe.recv_bytes()
        return b""

    def write_whole(pipe: "End[Any, Any]", content: bytes) -> None:
        pipe.send_bytes(content)

    def end_group(process: int) -> None:
        with suppress(psutil.NoSuchProcess):
            head = psutil.Process(process)
            for each in (*head.children(recursive=True), head):
                with suppress(psutil.NoSuchProcess):
                    each.kill()

    def bound_process(seconds: int, memory: int) -> None:
        pass  # the parent's limit of time is the bound

    def most_files() -> int:
        return sys.maxsize  # sockets are no files there

    def others_may_write(folder: Path) -> bool:
        return False  # a user's folders are the user's own

    def can_share(file: IO[str]) -> bool:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl
    import resource
    from multiprocessing.connection import Connection as End

    PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK  # of os.open: no link is followed, and no pipe waited for

    def handing(end: "End[Any, Any]") -> dict[str, Any]:
        """The arguments of Popen with which a child leads a group of its own and has this end of a pipe, by number."""
        return {"pass_fds": [end.fileno()], "start_new_session": True}

    def taken_over(number: int) -> "End[Any, Any]":
        """The end of a pipe that a child was handed by this number, and that its own children do not get."""
        os.set_inheritable(number, False)
        return End(number)

    def read_part(pipe: "End[Any, Any]", most: int) -> bytes:
        """At most so many bytes of what write_whole writes into the other end; b"" if that is closed."""
        return os.read(pipe.fileno(), most)

    def write_whole(pipe: "End[Any, Any]", content: bytes) -> None:
        with open(pipe.fileno(), "wb", closefd=False) as out:
            out.write(content)

    def end_group(process: int) -> None:
        """End a process that leads a group, and those that it started; not if it is gone."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process, signal.SIGKILL)

    def bound_process(seconds: int, memory: int) -> None:
        """Bound this process's seconds of a processor and bytes of memory."""
        for limit, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
            with suppress(ValueError):  # macOS takes no bound on memory
                resource.setrlimit(limit, (most, most))

    def most_files() -> int:
        """The most files and sockets that this process may open."""
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def others_may_write(folder: Path) -> bool:
        """True if a folder is another user's, but root's, or anybody may write into it; root asks for the latter."""
        now = folder.stat()
        return os.geteuid() not in (0, now.st_uid) and now.st_uid != 0 or bool(now.st_mode & stat.S_IWOTH)

    def can_share(file: IO[str]) -> bool:
        """False if another process holds a lock on an open file."""
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
