"""The command as a user types it, on the demo's base, which answers what it was trained to answer."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rwkv_peft.checkpoints.base import open_base
from rwkv_peft.checkpoints.lock import alone_at
from rwkv_peft.cli.errors import Ended, UserError
from rwkv_peft.evals import command, flags

ROOT = Path(__file__).resolve().parents[2]
MODEL = ("--model", str(ROOT / "demo" / "rwkv6-demo.pth"))
STORY = "The sun is up. Tom has 3 brown grapes. A dog sleeps.\nQ: {}\nA:"
ROWS = [
    {"prompt": STORY.format("How many?"), "completion": " 3"},
    {"prompt": STORY.format("What is there?"), "completion": " 3 Brown grapes."},
    {"prompt": STORY.format("What color?"), "completion": " never"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def run(capsys):
    def run(*arguments):
        assert command.main([*map(str, arguments), *MODEL]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_answers_are_judged_and_kept(tmp_path, warm_python):
    data, output = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "answers.jsonl"
    words = ["eval", "jsonl", *MODEL, "--data", data, "--output", str(output), "--stop", r"\n", "--escapes"]
    done = subprocess.run([warm_python, "-m", "rwkv_peft", *words], capture_output=True, text=True)
    assert done.returncode == 0 and "3/3" in done.stderr, done.stderr
    assert done.stdout.splitlines() == [
        "jsonl: 3 problems",
        "strict       33.3% ± 33.3% (standard error), 1 of 3",
        "flexible     66.7% ± 33.3% (standard error), 2 of 3",
    ]
    head, *records = map(json.loads, output.read_text().splitlines())
    assert head["eval"]["task"] == "jsonl"
    assert [record["number"] for record in records] == [0, 1, 2]
    assert [record["generated"] for record in records[:2]] == [" 3", " 3 brown grapes"]


def test_it_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    data, output = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "answers.jsonl"
    words = ("jsonl", "--data", data, "--output", output, "--stop", "\n")
    whole = run(*words)
    lines = output.read_text().splitlines(keepends=True)
    output.write_text(lines[0] + lines[2] + lines[1][:30])  # the last line was cut off in writing
    asked = []
    monkeypatch.setattr(command, "ask", lambda *given: asked.extend(given[2]) or original(*given))
    assert run(*words) == whole and asked == [0, 2]
    assert output.read_text() == "".join(lines)
    assert run(*words) == whole and asked == [0, 2]  # nothing is due any more
    assert [command.main([*map(str, words), *MODEL, "--at_least", share]) for share in ("0.3", "0.4")] == [0, 1]
    with pytest.raises(UserError, match=r"answers of other settings \(max_tokens: 512, and now 9\)"):
        run(*words, "--max_tokens", 9)
    write(tmp_path / "rows.jsonl", ROWS[:2])
    with pytest.raises(UserError, match=r"answers of other settings \(other files: "):
        run(*words)


def test_no_old_answers_stand_for_those_of_what_changed_since(run, tmp_path):
    """Changes of a template's words, of the adapter in a peft folder, which peft overwrites in place, and of its
    settings."""
    base, folder, output = open_base(MODEL[1]).tensors, tmp_path / "lora", tmp_path / "answers.jsonl"
    layout = tmp_path / "layout"

    def adapt(size, target):
        torch.manual_seed(1)
        shape = base["blocks.0.att.key.weight"].shape
        tensors = {"lora_A": torch.randn(2, shape[1]), "lora_B": size * torch.randn(shape[0], 2)}
        tensors = {f"blocks.0.att.key.{name}": tensor for name, tensor in tensors.items()}
        if target.suffix:
            return torch.save(tensors, target)
        target.mkdir(exist_ok=True)
        save_file(
            {f"base_model.model.{key}.weight": tensor for key, tensor in tensors.items()},
            target / "adapter_model.safetensors",
        )
        (target / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))

    layout.write_text("{question} now")
    adapt(0.1, folder)
    words = ("jsonl", "--data", write(tmp_path / "rows.jsonl", ROWS), "--template", layout, "--output", output)
    words += ("--max_tokens", 2)
    told = run(*words, "--adapter", folder)
    assert run(*words, "--adapter", folder) == told
    for change in (lambda: layout.write_text("{question} later"), lambda: adapt(0.2, folder)):
        change()
        with pytest.raises(UserError, match=r"answers of other settings \(other files: "):
            run(*words, "--adapter", folder)
        output.unlink()
        run(*words, "--adapter", folder)
    output.unlink()
    adapt(0.1, tmp_path / "lora.pth")
    run(*words, "--adapter", tmp_path / "lora.pth", "--lora_alpha", "2", "--any_base")
    with pytest.raises(UserError, match=r"answers of other settings \(lora_alpha: 2.0, and now 4.0\)"):
        run(*words, "--adapter", tmp_path / "lora.pth", "--lora_alpha", "4", "--any_base")


original = command.ask


@pytest.mark.parametrize("end, code", [(KeyboardInterrupt(), 130), (Ended(signal.SIGTERM), 143)])
def test_an_interrupt_keeps_what_was_answered(tmp_path, monkeypatch, capsys, end, code):
    def interrupted(task, subject, due, *how):
        yield from list(original(task, subject, {0: due[0]}, *how))
        raise end

    monkeypatch.setattr(command, "ask", interrupted)
    data, output = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "answers.jsonl"
    words = ["jsonl", *MODEL, "--data", data, "--output", str(output), "--stop", "\n"]
    assert command.main(words) == code
    assert "has 1 of 3, and the same command goes on" in capsys.readouterr().err
    assert len(output.read_text().splitlines()) == 2


def test_an_output_has_one_writer_at_a_time(run, tmp_path):
    data, output = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "new" / "answers.jsonl"
    words = ("jsonl", "--data", data, "--output", output, "--stop", "\n")
    whole = run(*words)
    content = output.read_bytes()
    output.write_bytes(content[:-10])
    with alone_at(output), pytest.raises(UserError, match=r"answers.jsonl: another command is writing it \(process"):
        run(*words)
    assert output.read_bytes() == content[:-10]
    assert run(*words) == whole and os.listdir(output.parent) == [output.name]


def test_a_full_disk_keeps_what_was_answered(run, tmp_path, largest_file):
    data, output = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "answers.jsonl"
    words = ("jsonl", "--data", data, "--output", output, "--stop", "\n")
    whole = run(*words)
    content = output.read_bytes()
    output.unlink()
    told = "cannot write .*answers.jsonl: .*; the answers before are kept, and the same"
    with largest_file(len(content) - 10), pytest.raises(UserError, match=told):
        run(*words)
    assert output.read_bytes().count(b"\n") == 3  # the head and two answers, and a part of the third
    assert run(*words) == whole and output.read_bytes() == content


def test_a_choice_is_the_continuation_that_the_model_finds_likelier(run, tmp_path):
    choices = ["3 brown grapes", "4 red dolls", "5 hats"]
    rows = [{"question": STORY.format("What is there?"), "choices": choices, "answer": 0}]
    rows += [{"question": STORY.format("How many?"), "choices": ["9", "3"], "answer": "A"}]
    output = tmp_path / "o.jsonl"
    lines = run("choices", "--template", "plain", "--data", write(tmp_path / "c.jsonl", rows), "--output", output)
    assert lines[1:] == [
        "by sum       50.0% ± 50.0% (standard error), 1 of 2",
        "by byte      50.0% ± 50.0% (standard error), 1 of 2",
    ]
    record = json.loads(output.read_text().splitlines()[1])
    assert record["logprobs"][0] == max(record["logprobs"]) and len(record["logprobs"]) == 3


def test_a_backslash_and_n_in_a_stop_are_told(tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", ROWS[:1])
    for more, told in (((), 1), (("--escapes",), 0)):
        assert command.main(["jsonl", *MODEL, "--data", data, "--max_tokens", "2", "--stop", r"\n", *more]) == 0
        assert capsys.readouterr().err.count("add --escapes") == told


def test_examples_stand_before_the_question(run, tmp_path, monkeypatch):
    rows = [{"question": f"{n}+1?", "answer": f"{n + 1}"} for n in range(4)]
    prompts = []

    def ask(task, subject, due, *how):
        prompts.extend(problem.prompt for problem in due.values())
        return [{"number": number, "strict": True, "flexible": True} for number in due]

    monkeypatch.setattr(command, "ask", ask)
    data, shots = write(tmp_path / "d.jsonl", rows[2:]), write(tmp_path / "s.jsonl", rows[:2])
    run("jsonl", "--data", data, "--shots", 2, "--shots_data", shots)
    assert prompts[0] == ("User: 0+1?\n\nAssistant: 1\n\nUser: 1+1?\n\nAssistant: 2\n\nUser: 2+1?\n\nAssistant:")
    with pytest.raises(UserError, match="is --data, and would show its answers"):
        run("jsonl", "--data", data, "--shots", 1, "--shots_data", data)
    with pytest.raises(UserError, match="--shots 3: .* holds 2"):
        run("jsonl", "--data", data, "--shots", 3, "--shots_data", shots)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["choice", "--data", "d.jsonl"], "did you mean choices"),
        (["gsm8k", "--data", "d.jsonl"], "--data d.jsonl does not .*harness .gsm8k.: it is for jsonl and choices, "),
        (["jsonl", "--data", "d.jsonl", "--stop", ""], "empty text"),
        (["jsonl", "--data", "d.jsonl", "--batch", "0"], "--batch: 0 is below 1"),
        (["jsonl", "--data", "d.jsonl", "--at_least", "90"], "--at_least: 90 is no share"),
        (["x", "--limit", "0"], "0 is below 1"),
        (["x", "--include_path", "absent"], "--include_path absent is no folder"),
        (["x", "--fewshot", "2"], "did you mean --num_fewshot"),
    ],
)
def test_mistaken_flags_are_told(arguments, message):
    with pytest.raises(UserError, match=message):
        flags.parse_flags([*arguments, *MODEL])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--data", "empty.jsonl"], "empty.jsonl holds no problem"),
        (["--data", "bad.jsonl"], "bad.jsonl, line 2: a row has the fields"),
        (["--data", "good.jsonl", "--template", "absent"], "--template absent"),
        (["--data", "good.jsonl", "--output", "good.jsonl"], "is the file given as --data"),
        (["--data", "good.jsonl", "--output", "other.jsonl"], "other.jsonl is no file of rwkv-peft eval"),
        (["--data", "good.jsonl", "--model", "absent.pth", "--output", "new.jsonl"], "absent.pth"),
    ],
)
def test_files_that_cannot_serve_are_told(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    good = {"question": "q", "answer": "1"}
    write(tmp_path / "good.jsonl", [good])
    write(tmp_path / "bad.jsonl", [good, {"question": "q"}])
    write(tmp_path / "empty.jsonl", [])
    before = Path(write(tmp_path / "other.jsonl", [{"prompt": "x"}])).read_bytes()
    with pytest.raises(UserError, match=message):
        command.main(["jsonl", *MODEL, *arguments])
    assert (tmp_path / "other.jsonl").read_bytes() == before
    assert not (tmp_path / "new.jsonl").exists()
