"""Commands in forks of one process that has already imported torch and the engines, which takes seconds.

Each behaves as `python FILE argument…` does: a process with its own memory, folder, variables, streams, signals and
exit code. Command is one; python() is a program in the place of Python, for scripts and for commands that start others.
The workers of one session of pytest share the process that is forked, which ends with the last of them.

    python warm.py serve SOCKET              is forked
    python warm.py ask SOCKET FILE argument… runs a file in a fork, as python() does
    python warm.py -u -c CODE                runs CODE; a fork of this is a worker of pytest
"""

import atexit
import functools
import gc
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

# They are read when warm_imports.IMPORTS are imported; a run itself sets the last one.
VARIABLES = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL"}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CHILDREN = Path(__file__).parents[1] / "RWKV-PEFT" / "rwkv_peft" / "children.py"  # which runs modules
# As Python would run a file or a module; the rest (-c, -I) is for Python itself, and so is a module that is handed a
# file descriptor besides the streams.
PROGRAM = """#!/bin/sh
[ "$1" != -u ] || shift
case "$1" in
-m) shift && set -- '{children}' "$@" ;;
-* | "") exec '{python}' "$@" ;;
esac
case "${{2-}}" in rwkv_peft.*.child) exec '{python}' "$@" ;; esac
exec '{python}' -IS '{warm}' ask '{socket}' "$@"
"""


def ask(address, argv, environment, streams=(0, 1, 2)):
    """Have argv (a file and its arguments) run in a fork, with these file descriptors as its streams -> (a file whose
    next line is its exit code; it is killed if the file is closed before, its process id)."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [b"!"], streams)
    connection.sendall(json.dumps([argv, dict(environment), os.getcwd()]).encode() + b"\n")
    told = connection.makefile("rb", buffering=0)
    connection.close()  # `told` holds it
    return told, int(told.readline())


def stand_in(address, argv):
    """Be the process that runs in the fork, for whoever started this one."""
    pid, came = 0, []  # signals, before the process is there

    def forward(number, _):
        send(pid, number) if pid else came.append(number)

    for number in SIGNALS:
        signal.signal(number, forward)
    told, pid = ask(address, argv, os.environ)
    for number in came:
        send(pid, number)
    code = int(told.readline() or -signal.SIGKILL)
    if code < 0:
        with suppress(OSError):  # of those that cannot be caught
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def send(pid, number):
    """Send a signal to a process, which may end at any moment."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


class Server:
    """Forks on request. Its connections: those of running commands, and those of sessions, which keep it alive."""

    def __init__(self, address):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{address}-new")
        self.listener.listen(64)
        os.rename(f"{address}-new", address)  # whoever sees it can connect
        self.running, self.sessions = {}, []
        self.ended, self.wakes = socket.socketpair()  # to be read from when a fork has ended
        self.wakes.setblocking(False)
        signal.set_wakeup_fd(self.wakes.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def serve(self):
        """Fork until the last session is over -> None; in a fork -> the arguments to run."""
        while True:
            heard = [self.listener, self.ended, *self.sessions, *self.running]
            ready, _, _ = select.select(heard, [], [], None if self.sessions else 60)
            if not ready:  # who started this process was killed before it could begin a session
                return None
            for connection in ready:
                if connection is self.ended:
                    self.ended.recv(4096)
                    self.reap()
                elif connection is self.listener:
                    if argv := self.answer(self.listener.accept()[0]):
                        return argv
                elif connection in self.running:
                    send(self.running.pop(connection), signal.SIGKILL)  # nobody waits for it any more
                    connection.close()
                elif connection in self.sessions:
                    self.sessions.remove(connection)
                    if not self.sessions:
                        return None

    def reap(self):
        """Tell of each command that has ended."""
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                for connection in [one for one, pid in self.running.items() if pid == found[0]]:
                    del self.running[connection]
                    with suppress(OSError), connection:
                        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(found[1]))

    def answer(self, connection):
        """Take a session in, or fork for a command -> in the fork, its arguments. Who asks may be killed any time."""
        connection.settimeout(60)  # or stopped
        word, streams, line = b"", [], b""
        with suppress(OSError):
            word, streams, _, _ = socket.recv_fds(connection, 1, 3)
            line = connection.makefile("rb").readline() if word == b"!" else b""
        if word == b".":
            self.sessions.append(connection)
            return None
        if not line.endswith(b"\n"):
            connection.close()
            for stream in streams:
                os.close(stream)
            return None
        argv, environment, folder = json.loads(line)
        if (pid := os.fork()) == 0:
            signal.set_wakeup_fd(-1)
            for other in (self.listener, self.ended, self.wakes, *self.sessions, *self.running):
                other.close()
            become(streams, environment, folder)
            with suppress(OSError), connection:  # now that it hears signals
                connection.sendall(b"%d\n" % os.getpid())
            return argv
        for stream in streams:
            os.close(stream)
        self.running[connection] = pid
        return None


def become(streams, environment, folder):
    """Be a new process of Python by its streams, variables, folder and signals."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for number, name in ((1, "stdout"), (2, "stderr")):  # the old ones know whether their file could seek
        lines = name == "stderr" or os.isatty(1)
        stream = open(number, "w", 1 if lines else -1, errors=getattr(sys, name).errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which is ignored where the tests run under nohup
    signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit.register(gc.unfreeze)  # so that Python's end finds nothing that was left behind


def main(address):
    import warm_imports

    server = Server(address)
    warm_imports.load()
    sys.executable = str(Path(address).with_name("python"))
    gc.collect()
    gc.freeze()  # what was imported for all commands is looked through in none, and not torn down at its end
    weakref.finalize._registry.clear()
    if argv := server.serve():
        sys.argv, sys.path[0] = argv, os.path.dirname(os.path.abspath(argv[0]))
        if Path(argv[0]) != Path(__file__):
            warm_imports.draw_at_once()
        code = 0
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as ended:
            if not isinstance(ended.code, int | None):
                raise
            code = ended.code or 0
        leave(code)


def leave(code):
    """End as Python does, but tear down nothing that was imported, which takes 2 s: four times a short run."""
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        sys.exit(code)  # Python tells of it
    os._exit(code)


folder = None  # of the session's socket; conftest.py sets it


@functools.cache
def address():
    """The socket of the process that is forked, which is started if no worker of this session has done so, or if it
    ended with those that had."""
    from filelock import FileLock

    path = Path(folder) / "socket"
    with FileLock(Path(folder) / "lock"):
        try:
            session.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            program = path.with_name("python")
            program.write_text(PROGRAM.format(children=CHILDREN, python=sys.executable, warm=__file__, socket=path))
            program.chmod(0o755)
            search = os.pathsep.join(filter(None, [str(CHILDREN.parents[1]), *sys.path]))
            command = [sys.executable, __file__, "serve", str(path)]
            server = subprocess.Popen(
                command, env=os.environ | VARIABLES | {"PYTHONPATH": search}, stdin=subprocess.DEVNULL
            )
            while not path.exists():
                assert server.poll() is None
                time.sleep(0.01)
            session.connect(str(path))
    session.sendall(b".")
    return str(path)


session = socket.socket(socket.AF_UNIX)  # while it is open, the process that is forked lives


def worker():
    """A command line like Python's for the workers of pytest, which import most of what the server has."""
    return shlex.join([python(), __file__])


def python():
    """A program that runs files as Python does, in forks, and the rest in a Python of its own."""
    return str(Path(address()).with_name("python"))


class Command:
    """A running `python FILE argument…`, with the part of subprocess.Popen's interface that the tests use."""

    stdout = None  # which goes to the first of `outputs`, a file

    def __init__(self, argv, environment):
        assert argv[0] == sys.executable and environment["OMP_NUM_THREADS"] == VARIABLES["OMP_NUM_THREADS"]
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [Path(self.folder.name) / name for name in ("stdout", "stderr")]
        self.args, self.returncode = argv, None
        streams = [
            os.open(os.devnull, os.O_RDONLY),
            *(os.open(path, os.O_WRONLY | os.O_CREAT) for path in self.outputs),
        ]
        self.told, self.pid = ask(address(), argv[1:], environment, streams)
        for stream in streams:
            os.close(stream)

    def poll(self, timeout=0):
        if self.returncode is None and select.select([self.told], [], [], timeout)[0]:
            self.returncode = int(self.told.readline() or -signal.SIGKILL)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            send(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        if self.poll(timeout) is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return tuple(path.read_text() for path in self.outputs)


if __name__ == "__main__":
    role, *words = sys.argv[1:]
    if role == "-u":
        sys.executable = sys.orig_argv[0]  # what a worker starts is cold unless a test asks for warm_python
        exec(words[1])
    else:
        stand_in(words[0], words[1:]) if role == "ask" else main(*words)
