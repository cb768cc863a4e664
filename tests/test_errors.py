"""How a command reports what ends it."""

import io
import sys

import pytest

from rwkv_peft.errors import UserError, exit_on_user_error


def test_an_interrupt_ends_a_command_with_one_word(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(interrupted)
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_what_is_no_unicode_is_printed_escaped(monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams):
        monkeypatch.setattr(sys, name, stream)

    def refusing(argv):
        print("\ud800")
        raise UserError("\udfff")

    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(refusing)
    for stream in streams:
        stream.flush()
    assert ended.value.code == 2
    assert [stream.buffer.getvalue() for stream in streams] == [b"\\ud800\n", b"error: \\udfff\n"]
