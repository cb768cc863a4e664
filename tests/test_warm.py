"""The process that the tests fork outlives whoever asks it for a fork."""

import os
import socket
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
