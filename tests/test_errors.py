"""A command reports the error or signal that ends it."""

import io
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_peft.checkpoints.atomic import atomic_write
from rwkv_peft.cli import commands
from rwkv_peft.cli.errors import UserError, bar_seconds, exit_on_user_error, field_names, short, some
from rwkv_peft.inference.serve.service import is_cuda_error

PACKAGE = str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")
ENDS = [(signal.SIGTERM, 143, "terminated\n"), (signal.SIGHUP, 129, "ended: the terminal is gone\n")]


def code_of(command):
    """The exit code with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(command)
    return ended.value.code


def test_an_interrupt_ends_a_command_with_one_word(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert code_of(interrupted) == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_limit_on_open_files_is_told(capsys):
    """For example with two ranks under ulimit -n 24, whose pipes have no name."""

    def opening(argv):
        least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, most))
        try:
            os.pipe()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (least, most))

    assert code_of(opening) == 2 and "ulimit -n 1024" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [np.empty, bytearray])
def test_memory_that_is_full_is_told(asked, capsys):
    code, error = code_of(lambda argv: asked(1 << 58)), capsys.readouterr().err
    assert code == 2 and error.startswith("error: no more memory is free (") and "rwkv-peft plan" in error


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",  # torch's AcceleratorError
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error in: …, unhandled cuda error\nCuda failure 2 'out of memory'",
    ],
)
def test_a_gpu_whose_memory_is_full_is_told_in_every_librarys_words(words, capsys):
    def step(argv):
        raise RuntimeError(words)

    assert code_of(step) == 2 and "error: the GPU's memory is full; " in capsys.readouterr().err
    assert not is_cuda_error(RuntimeError(words))  # the server goes on


@pytest.mark.parametrize("notes", [(), ("lower --micro_bsz", "the step before took 7 GiB")])
def test_a_gpu_whose_memory_is_full_is_told_with_the_remedy(notes, capsys):
    def step(argv):
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")
        for note in notes:
            error.add_note(note)
        raise error

    code, error = code_of(step), capsys.readouterr().err
    assert code == 2 and error.startswith("error: the GPU's memory is full, and 2.00 GiB more are needed; ")
    assert "; ".join(notes) in error and ("rwkv-peft plan" in error or notes) and error.count("\n") == 1


@pytest.fixture
def default_signals():
    """Reset the signals to those that a shell gives a command, whatever the tests run under."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number, _, _ in ENDS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number, code, words", ENDS)
def test_a_signal_leaves_no_half_of_a_file(number, code, words, tmp_path, capsys):
    def writing(argv):
        with atomic_write(tmp_path / "new" / "file"):
            os.kill(os.getpid(), number)
            pytest.fail("the command goes on")

    assert code_of(writing) == code and capsys.readouterr().err == words
    assert not list(tmp_path.glob("new/*")) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.usefixtures("default_signals")
def test_a_signal_that_is_to_be_ignored_is():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    assert not code_of(lambda argv: os.kill(os.getpid(), signal.SIGHUP))


def test_what_is_no_unicode_is_printed_escaped(monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams):
        monkeypatch.setattr(sys, name, stream)

    def refusing(argv):
        print("\ud800")
        raise UserError("\udfff")

    assert code_of(refusing) == 2
    for stream in streams:
        stream.flush()
    assert [stream.buffer.getvalue() for stream in streams] == [b"\\ud800\n", b"error: \\udfff\n"]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_is_read_is_utf8_where_the_locale_says_nothing(encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("ü".encode() + b"\xff"), encoding=encoding))
    assert not code_of(lambda argv: sys.stdin.read() != "ü\udcff")


def test_output_that_nobody_reads_ends_a_command_without_a_word():
    """As in `rwkv-peft --help | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "rwkv_peft", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": PACKAGE})
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_bar_is_seldom_drawn_into_a_log(monkeypatch):
    log = io.StringIO()
    assert bar_seconds(log) >= 10
    monkeypatch.setattr(log, "isatty", lambda: True, raising=False)
    assert bar_seconds(log) < 1


def test_what_a_file_calls_itself_does_not_reach_the_terminal_as_an_order(tmp_path, capsys):
    """Through inspect: a tensor has a name that would clear the screen, in a message and in a table."""
    name = "\x1b[2J\x1b]0;owned\x07\u202ereversed\r\x9b31m"
    for number, names in enumerate(([name], [name + ".lora_A", name + ".lora_B"])):
        torch.save({key: torch.ones(2, 2) for key in names}, tmp_path / f"{number}.pth")
        commands.main(["inspect", str(tmp_path / f"{number}.pth")])
    error = UserError(f"a\n{name}", "\tis no key")
    for text in (capsys.readouterr().out, str(error)):
        assert text.replace("\n", "").replace("\t", "").isprintable() and "\\x1b[2J" in text
    assert str(error).startswith("a\\n\\x1b[2J") and str(error).endswith("\n\tis no key")


def test_no_handler_of_libraries_errors_takes_a_refusal():
    assert UserError.__bases__ == (Exception,)


def test_names_from_files_pass_for_no_line_and_fill_no_screen():
    names = [f"{number}\nerror: \x1b[31mforged\u2028" for number in range(1000)]
    told = short("\n".join(names)), some(names), field_names(dict.fromkeys(names)), str(UserError(short(names[0])))
    for text in told:
        assert text.isprintable() and len(text) < 1000


@pytest.mark.parametrize("size", [100, 70_000, 1_000_000])
def test_a_message_has_its_beginning_and_its_remedy_whatever_it_quotes(size):
    found = str(UserError(f"field {'x' * size!r} is missing; name it", "é" * size))
    assert found.startswith("field 'xxx") and "xxx' is missing; name it\né" in found
    assert len(found) <= 8100 and (size > 4000 or "…" not in found)
