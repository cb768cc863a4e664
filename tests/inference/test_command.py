"""The command: its output, its files, and its messages when something is wrong."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from release.merges import adapter_of
from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.checkpoints.tensors import read_tensors
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.chat import THINK
from rwkv_peft.data.recorded import record_of
from rwkv_peft.data.tokenizer import BytesTokenizer, load_tokenizer
from rwkv_peft.inference import command, decode, flags
from rwkv_peft.inference.decode import GeneratedToken
from rwkv_peft.inference.loading import load_subject
from rwkv_peft.models.layout import time_state_shapes
from rwkv_peft.release import merge_command


def script(monkeypatch, *texts):
    """Make the command's model say these texts, one for each prompt, and then end the document."""

    def says(model, prompts, sampling, max_tokens, ends, *rest):
        for number, text in enumerate(texts):
            for token in [*BytesTokenizer().encode(text), 0]:
                end = ends(number, token)
                yield GeneratedToken(number, token, end)
                if end:
                    break

    monkeypatch.setattr(decode, "generate", says)


def test_a_model_that_is_not_finite_is_named(tiny_state, tmp_path):
    state = tiny_state(vocab_size=257)
    state["emb.weight"][256] = float("inf")
    save_model(tmp_path / "model.pth", state)
    with pytest.raises(UserError, match=r"model.pth is not finite: emb.weight holds NaN or Inf, at \[256, 0\] first"):
        command.main(["--model", str(tmp_path / "model.pth"), "--prompt", "a"])


def test_a_damaged_prompt_is_reported_after_the_others_are_written(tiny_state, tmp_path, capsys):
    state = tiny_state(vocab_size=257)
    state["emb.weight"][ord("x") + 1] = 3e38  # whose norm is not finite
    save_model(tmp_path / "model.pth", state)
    (tmp_path / "prompts.txt").write_text("ax\nb\nc\nx\n")
    flags = ["--prompt_file", str(tmp_path / "prompts.txt"), "--max_tokens", "2", "--tokenizer", "bytes"]
    for more in ([], ["--output", str(tmp_path / "found.jsonl")]):
        with pytest.raises(UserError, match=r"NaN or Inf for prompt 0 after 0 tokens \(and 1 more\)"):
            command.main(["--model", str(tmp_path / "model.pth"), *flags, *more])
    told = capsys.readouterr().out
    assert [json.loads(line)["prompt"] for line in told.splitlines()] == ["b", "c"]
    assert (tmp_path / "found.jsonl").read_text() == told


def test_a_tokenizer_of_far_fewer_tokens_than_the_model_has_is_noted_and_none_refused(tiny_state, tmp_path, capsys):
    save_model(tmp_path / "model.pth", tiny_state(vocab_size=80))
    with pytest.raises(UserError, match="give --tokenizer"):
        command.main(["--model", str(tmp_path / "model.pth"), "--prompt", "a"])
    (tmp_path / "own.txt").write_text("".join(f"{i + 1} {chr(i)!r} 1\n" for i in range(128)))
    for vocab_size, told in ((1024, True), (200, False)):
        save_model(tmp_path / "model.pth", tiny_state(vocab_size=vocab_size))
        argv = ["--model", str(tmp_path / "model.pth"), "--tokenizer", str(tmp_path / "own.txt"), "--prompt", "a"]
        assert command.main([*argv, "--max_tokens", "1"]) == 0
        note = f"and it lacks most of the model's {vocab_size:,} tokens"
        assert (note in capsys.readouterr().err) is told


def test_one_prompt_streams_its_text(run, monkeypatch):
    script(monkeypatch, "né 你好")
    shown = []
    monkeypatch.setattr(command, "show", shown.append)
    run("--prompt", "x")
    assert shown == ["n", "é", " ", "你", "好", "\n"]


CHAT = "User: hi\n\nAssistant:"
OPENINGS = ("", " <think>\n</think>\n", *(mode.opening for mode in THINK.values()))
NEXT = " Yo\n\nUser: no"


@pytest.mark.parametrize(
    "prompt, says, flags, printed",
    [
        ("x", "Hello.\nUser: no", ["--stop", "\nUser:", "never"], "Hello."),
        ("x", "Hello.\nUser: no", ["--stop", r"\nU", "--escapes"], "Hello."),
        ("hi", NEXT, [], NEXT),
        *((f"{CHAT}{opening}", NEXT, [], " Yo") for opening in OPENINGS),
        (CHAT, " Yo\n\nTool: no", [], " Yo"),
        (CHAT, NEXT, ["--stop", "no"], " Yo\n\nUser: "),
        ("Question: 2+2?\n\nAnswer:", " 4\n\nQuestion: no", [], " 4"),
        ("Instruction: Add\n\nInput: 2 2\n\nResponse:", " 4\n\nInstruction: no", [], " 4"),
    ],
)
def test_stop_texts_and_the_next_turn_of_a_known_layout_end_the_text(run, monkeypatch, prompt, says, flags, printed):
    script(monkeypatch, says)
    assert run("--prompt", prompt, *flags) == printed + "\n"


def test_several_prompts_give_a_line_of_json_each(run, monkeypatch):
    script(monkeypatch, "one", "two|", "3")
    rows = [json.loads(line) for line in run("--prompt", "a", "b", "c", "--stop", "|").splitlines()]
    assert rows == [
        {"prompt": "a", "generated": "one", "tokens": 4, "end": "end"},
        {"prompt": "b", "generated": "two", "tokens": 4, "end": "stop"},
        {"prompt": "c", "generated": "3", "tokens": 2, "end": "end"},
    ]


def test_lines_keep_the_order_of_the_prompts(run):
    rows = [json.loads(line) for line in run("--prompt", *"abcdefg", "--batch", 3, "--max_tokens", 9).splitlines()]
    assert [row["prompt"] for row in rows] == list("abcdefg")
    alone = json.loads(run("--prompt", "e", "x", "--max_tokens", 9, "--seed", 4).splitlines()[0])
    assert rows[4]["generated"] == alone["generated"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson", "p.jsonl.gz", "p.json"])
def test_prompts_of_every_kind_of_json_keep_their_fields(run, tmp_path, name):
    lines = ['{"prompt": "a", "id": 7}', '{"prompt": ""}']
    text = f"[{', '.join(lines)}]" if name == "p.json" else "\n\n".join(lines)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    rows = [json.loads(line) for line in run("--prompt_file", tmp_path / name, "--max_tokens", 2).splitlines()]
    assert [(row["prompt"], row.get("id"), row["tokens"]) for row in rows] == [("a", 7, 2), ("", None, 2)]


@pytest.mark.parametrize("name, line", [("p.txt", "hello\n"), ("p.jsonl", '{"prompt": "hello", "id": "\\ud800"}\n')])
def test_a_byte_order_mark_is_dropped_and_a_field_that_utf8_cannot_hold_is_kept(run, tmp_path, name, line):
    (tmp_path / name).write_text(line, encoding="utf-8-sig")
    run("--prompt_file", tmp_path / name, "--output", tmp_path / "o.jsonl", "--max_tokens", "1")
    row = json.loads((tmp_path / "o.jsonl").read_text(encoding="utf-8"))
    assert row["prompt"] == "hello" and row.get("id", "\ud800") == "\ud800"


def test_plain_prompts_come_from_a_file_or_from_standard_input(run, tmp_path, monkeypatch):
    source = tmp_path / "prompts.txt"
    source.write_bytes("first é\r\n\nsecond\n".encode())
    printed = run("--prompt_file", source, "--max_tokens", 3)
    assert [json.loads(line)["prompt"] for line in printed.splitlines()] == ["first é", "second"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("first é\nsecond\n"))
    assert run("--prompt_file", "-", "--max_tokens", 3) == printed
    given = io.TextIOWrapper(io.BytesIO(b"Hi\nGr\xfc\xdfe\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", given)
    with pytest.raises(UserError, match=r"--prompt_file - is not UTF-8 \(byte 5\)"):
        run("--prompt_file", "-")


def test_going_on_from_a_saved_session_equals_one_call(run, tmp_path):
    session = tmp_path / "session.pth"
    whole = run("--prompt", "Once upon", "--temperature", 0, "--max_tokens", 12)
    assert run("--prompt", "Once", "--max_tokens", 0, "--save_state", session) == "\n"
    assert run("--prompt", " upon", "--state", session, "--temperature", 0, "--max_tokens", 12) == whole


@pytest.mark.parametrize(
    "says, stops, shown",
    [
        ("cd|", ["|"], "cd"),
        ("cd", ["|"], "cd"),  # ended by the end of the document
        (" Yo\n\nUser: no", [], " Yo"),
        (" Yo\n\nno", ["\n\nUser:"], " Yo\n\nno"),
        ("é|", ["|"], "é"),
        ("|", ["|"], ""),
    ],
)
def test_a_saved_session_is_behind_what_is_printed(run, tmp_path, monkeypatch, says, stops, shown):
    prompt = "User: hi\n\nAssistant:"
    with monkeypatch.context() as patch:
        script(patch, says)
        flags = ["--stop", *stops] if stops else []
        assert run("--prompt", prompt, *flags, "--save_state", tmp_path / "one.pth") == shown + "\n"
    run("--prompt", prompt + shown, "--max_tokens", 0, "--save_state", tmp_path / "two.pth")
    one, two = (read_tensors(tmp_path / name) for name in ("one.pth", "two.pth"))
    assert list(one) == list(two)
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "needs --prompt or --prompt_file or --chat"),
        (["--prompt", "a", "--prompt_file", "b"], "--prompt a does not go with --prompt_file b"),
        (["--prompt", "a", "--chat"], "--prompt a does not go with --chat"),
        (["--chat", "--output", "a.jsonl"], "--output a.jsonl does not go with --chat"),
        (["--chat", "--save_state", "a.pth"], "type /save FILE"),
        (["--prompt", "a", "--save_state", "a.st"], "--save_state a.st: a session is a .pth"),
        (["--prompt", "a", "--max_tokens", "-1"], "max_tokens: -1"),
        (["--prompt", "a", "--batch", "0"], "batch: 0"),
        (["--prompt", "a", "--top_p", "7"], "top_p 7"),
        (["--prompt", "a", "--stop", ""], "--stop"),
        (["--prompt", "a", "b", "--save_state", "s.pth"], "--save_state"),
        (["--prompt", "a", "--tokenizer", "world"], "65,536 tokens"),
        (["--prompt", "a", "--tokenizer", "absent.json"], "absent.json"),
        (["--prompt", "a", "--state", "absent.pth"], "absent.pth"),
        (["--prompt", "a", "--adapter", "absent.safetensors"], "absent.safetensors"),
        (["--prompt_file", "absent.txt"], "absent.txt"),
        (["--prompt", "a", "--temprature", "1"], "did you mean --temperature"),
    ],
)
def test_mistakes_are_named(model, arguments, message):
    with pytest.raises(UserError, match=message):
        command.main(["--model", str(model), *arguments])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', 'line 2: an object with a "prompt"'),
        ("p.jsonl", b"a\n", "line 1: not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b", "end": 7}', "line 2: the row has a field end, and the output's"),
        ("p.json", b'[{"prompt": "a", "tokens": 1, "generated": "b"}]', "row 1: .* generated and a field tokens"),
        ("p.txt", b"\n \n", "no prompt"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_prompt_files_that_cannot_be_read_are_named(model, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        command.main(["--model", str(model), "--prompt_file", str(tmp_path / name)])


@pytest.mark.parametrize("flag, name", [("--adapter", "bone"), ("--state", "none")])
@pytest.mark.parametrize("given", ["run", "run/adapter.safetensors"])
def test_the_tokenizer_of_a_run_is_found_by_its_folder_too(model, tmp_path, flag, name, given):
    texts = [chr(byte) if byte < 128 else bytes([byte]) for byte in range(256)]
    (tmp_path / "reversed.txt").write_text("".join(f"{256 - byte} {text!r} 1\n" for byte, text in enumerate(texts)))
    tokenizer = load_tokenizer(tmp_path / "reversed.txt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(record_of(tokenizer, []))
    config = open_base(model).config
    tensors = {key: torch.ones(shape) for key, shape in time_state_shapes(config).items()}
    if name == "bone":
        tensors = {"blocks.0.att.key.bone": torch.ones(4, config.n_embd)}
    save_adapter(tmp_path / "run" / "adapter.safetensors", tensors, AdapterMetadata(name, rank=4 * (name == "bone")))
    args = flags.build_parser().parse_args(["--model", str(model), flag, str(tmp_path / given), "--prompt", "a"])
    assert load_subject(args, print).tokenizer.name == tokenizer.name


def test_adapters_at_scales_answer_as_their_merge(run, model, tmp_path, capsys):
    base, files = open_base(model).tensors, [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    for seed, (variant, file) in enumerate(zip(("bat-in", "dora"), files)):
        save_adapter(file, *adapter_of(variant, base, seed=9 * seed))
    scaled, asked = [f"{files[0]}=0.7", f"{files[1]}=-2"], ("--prompt", "a", "--temperature", 0)
    found = [run(*asked, "--adapter", *given) for given in (scaled, files, [scaled[0], "--adapter", scaled[1]])]
    assert merge_command.main(["--base_model", str(model), "--adapter", *scaled, "--output", f"{tmp_path}/m.pth"]) == 0
    capsys.readouterr()
    assert command.main(["--model", f"{tmp_path}/m.pth", *map(str, asked)]) == 0
    assert capsys.readouterr().out == found[0] == found[2] != found[1]


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
    assert (left.wait(timeout=60), left.stderr.read()) == (141, b"")
    _, error = interrupted.communicate(timeout=60)
    assert (interrupted.returncode, error.decode().strip()) == (130, "interrupted")
