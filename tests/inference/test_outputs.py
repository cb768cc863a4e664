"""The command's outputs: inputs are never overwritten, and what was done survives interrupts and full disks."""

import json
import os
import signal
import subprocess
from itertools import product
from pathlib import Path

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.inference import command, decode
from rwkv_peft.inference.decode import GeneratedToken

PACKAGE = Path(command.__file__).resolve().parents[2]


INPUTS = ("--model", "--prompt_file", "--adapter", "--state")


@pytest.mark.parametrize("flag, given_as", [*product(["--output"], INPUTS), *product(["--save_state"], INPUTS[:3])])
def test_no_input_is_overwritten(model, tmp_path, flag, given_as):
    files = {name: tmp_path / name.strip("-") for name in INPUTS}
    for file in files.values():
        file.write_text("an input")
    (tmp_path / "link").symlink_to(files[given_as])
    with pytest.raises(UserError, match=f"{flag} .*link is the file given as {given_as}"):
        command.main([*(str(word) for pair in files.items() for word in pair), flag, str(tmp_path / "link")])
    assert all(file.read_text() == "an input" for file in files.values())


def test_a_session_may_go_on_in_its_own_file_but_not_in_the_output(run, model, tmp_path):
    session = tmp_path / "session.pth"
    run("--prompt", "a", "--max_tokens", 2, "--save_state", session)
    before = session.read_bytes()
    run("--prompt", "b", "--max_tokens", 2, "--state", session, "--save_state", session)
    assert session.read_bytes() != before
    with pytest.raises(UserError, match="are both"):
        command.main(["--model", str(model), "--prompt", "a", "--output", str(session), "--save_state", str(session)])


@pytest.mark.parametrize("flag", ["--output", "--save_state"])
def test_outputs_that_cannot_be_written_are_refused_before_the_model_is_read(tmp_path, flag, monkeypatch):
    (tmp_path / "plain").write_text("")
    monkeypatch.setattr(command, "load_subject", None)
    with pytest.raises(UserError, match="a file stands where"):
        command.main(["--model", "m.pth", "--prompt", "a", flag, str(tmp_path / "plain" / "x")])


def test_an_interrupt_keeps_what_was_complete(model, tmp_path, monkeypatch, capsys):
    def interrupted(model, prompts, sampling, max_tokens, ends, *rest):
        yield GeneratedToken(0, 98, ends(0, 98))
        yield GeneratedToken(0, 0, ends(0, 0))
        yield GeneratedToken(1, 99, ends(1, 99))
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "generate", interrupted)
    output = tmp_path / "out.jsonl"
    assert command.main(["--model", str(model), "--prompt", "a", "b", "--output", str(output)]) == 130
    assert [json.loads(line)["generated"] for line in output.read_text().splitlines()] == ["a"]
    assert "1 of 2 prompts, " in (said := capsys.readouterr().err) and said.endswith("interrupted\n")


def prompts_in(path):
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def test_a_line_is_in_the_file_as_soon_as_it_is_done(model, tmp_path, monkeypatch):
    """So that it survives whatever ends the process; at the end all lines are in the order of the prompts. The first
    line replaces earlier content."""
    output, seen = tmp_path / "out.jsonl", []
    output.write_text('{"prompt": "before"}\n')

    def says(model, prompts, sampling, max_tokens, ends, *rest):
        for number in (2, 0, 1):
            seen.append(prompts_in(output))
            yield GeneratedToken(number, 98, ends(number, 98))
            yield GeneratedToken(number, 0, ends(number, 0))
        seen.append(prompts_in(output))

    monkeypatch.setattr(decode, "generate", says)
    words = ["--model", str(model), "--prompt", "a", "b", "c", "--output", str(output)]
    assert command.main(words) == 0
    assert seen == [["before"], ["c"], ["c", "a"], ["c", "a", "b"]]
    assert prompts_in(output) == ["a", "b", "c"] and list(tmp_path.iterdir()) == [output]


def test_a_full_disk_ends_the_work_and_leaves_the_lines_before(model, tmp_path, monkeypatch, largest_file):
    output = tmp_path / "out.jsonl"

    def says(model, prompts, sampling, max_tokens, ends, *rest):
        for number, most in ((0, None), (2, 70), (1, None)):
            with largest_file(most):
                yield GeneratedToken(number, 0, ends(number, 0))

    monkeypatch.setattr(decode, "generate", says)
    words = ["--model", str(model), "--prompt", "a", "b", "c", "--output", str(output)]
    with pytest.raises(UserError, match="out.jsonl: file too large; the lines before are kept"):
        command.main(words)
    assert json.loads(output.read_text().splitlines()[0])["prompt"] == "a"


def start(python, model, *arguments):
    return subprocess.Popen(
        [python, "-m", "rwkv_peft", "generate", "--model", str(model), *arguments],
        env=os.environ | {"PYTHONPATH": str(PACKAGE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_ctrl_c_and_a_reader_that_leaves_end_the_process_cleanly(model, warm_python):
    # the most likely token is never this model's end of text (0), so that both would go on for a million tokens
    left, interrupted = (
        start(warm_python, model, "--prompt", "a", "--max_tokens", "1000000", "--temperature", "0") for _ in range(2)
    )
    for process in (left, interrupted):
        assert process.stdout.read(4)
    left.stdout.close()
    interrupted.send_signal(signal.SIGINT)
    assert (left.wait(timeout=60), left.stderr.read()) == (0, b"")
    _, error = interrupted.communicate(timeout=60)
    assert (interrupted.returncode, error.decode().strip()) == (130, "interrupted")
