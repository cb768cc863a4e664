"""The process that the tests fork outlives whoever asks it for a fork."""

import os
import signal
import socket
import subprocess
import sys

import pytest

import warm


@pytest.mark.parametrize("sent", [b"", b"!", b'![["file"], {', b'![["file"], {}, "/"]\n'])
def test_who_is_killed_while_asking_ends_nothing(tmp_path, sent):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(warm.address())
        if sent:
            with open(os.devnull) as nothing:
                socket.send_fds(connection, [sent[:1]], [nothing.fileno()] * 3)
            connection.sendall(sent[1:])
    program = tmp_path / "program.py"
    program.write_text("print('ran')")
    assert warm.Command([sys.executable, str(program)], {**os.environ, **warm.VARIABLES}).communicate(60)[0] == "ran\n"


def test_a_signal_that_comes_before_the_fork_reaches_it(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        asking = subprocess.Popen([sys.executable, "-IS", warm.__file__, "ask", str(tmp_path / "socket"), "file"])
        with listener.accept()[0] as connection, subprocess.Popen(["sleep", "60"]) as forked:
            asking.send_signal(signal.SIGINT)
            connection.sendall(b"%d\n" % forked.pid)
            assert forked.wait() == -signal.SIGINT
            connection.sendall(b"130\n")
        assert asking.wait() == 130
