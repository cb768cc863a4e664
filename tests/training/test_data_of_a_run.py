"""From rows to a run by the commands that a user types: the tokens that count are those that the header names, and the
data's tokenizer goes with the run, so that nobody retypes it."""

import json
import re
import sys

import pytest

from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.cli import commands
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.recorded import Vocabulary, read_record, vocabulary_of
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.training import inputs, run
from training.runs import ROOT, finish, start

ROWS = [{"query": f"{i} birds?", "response": f"{i}!"} for i in range(20)]
TOTAL = sum(len(f"User: {i} birds?\n\nAssistant: {i}!") + 1 for i in range(20))
ANSWERS = sum(len(f" {i}!") + 1 for i in range(20))


@pytest.fixture
def train(tmp_path, tiny_state, monkeypatch, capsys):
    """train(*flags) -> (output, the samples that the engine would get), without the engine. The data is that of ROWS,
    preprocessed."""
    save_model(tmp_path / "base.pth", tiny_state(vocab_size=257))
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = []

    def train_to_the_end(prepared, say):
        given.append(prepared.samples)
        return 0, ""

    monkeypatch.setattr(run, "train_to_the_end", train_to_the_end)

    def main(*words):
        assert commands.main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    main("preprocess", tmp_path / "chat.jsonl", "--output", tmp_path / "chat", "--tokenizer", "bytes")

    def run_it(*flags):
        words = ["--load_model", tmp_path / "base.pth", "--proj_dir", tmp_path / "out"]
        words += ["--bone_r", 16] * ("--peft" not in flags)
        data = [] if "--data_file" in flags else ["--data_file", tmp_path / "chat"]
        header = main("train", *words, *data, "--ctx_len", 64, "--accelerator", "cpu", *flags)
        return header, given[-1] if given else None

    return run_it


def counted(samples):
    return sum(samples.count(n) for n in range(len(samples)))


@pytest.mark.parametrize("dataload", ["pad", "pack"])
def test_answers_that_are_cut_off_are_said(train, dataload):
    """With 27 tokens a row, answers to questions of one digit keep one token of four, to those of two digits none of
    five."""
    header, samples = train("--dataload", dataload, "--ctx_len", 26)
    assert counted(samples) == 10 and ANSWERS == 90
    told = "note: 80 of the tokens that would count in the loss are among those not read, and 10 documents keep"
    assert told in header
    header, samples = train("--dataload", dataload)
    assert counted(samples) == ANSWERS and "not read" not in header


def test_a_text_is_read_by_its_encoding_and_cut_at_the_ends_of_its_documents(train, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "stories.txt").write_bytes("你好\n***\n世界\n".encode("gbk"))
    flags = ("--data_file", tmp_path / "stories.txt", "--data_type", "sft", "--dataload", "pad", "--epoch_steps", 1)
    _, samples = train(*flags, "--tokenizer", "bytes", "--encoding", "gbk", "--document_end", "stars")
    decode = load_tokenizer("bytes").decode
    assert {decode(tokens.tolist()) for tokens, _ in map(samples.__getitem__, range(len(samples)))} == {
        "你好\n",
        "世界\n",
    }


@pytest.mark.parametrize("dataload", ["get", "pad", "pack"])
def test_a_mask_beside_the_data_is_used_and_said(train, dataload):
    header, samples = train("--dataload", dataload)
    assert f"loss on {ANSWERS:,} of {TOTAL:,} tokens (answers)" in header
    assert counted(samples) == ANSWERS


def test_a_mask_that_is_named_wins(train, tmp_path):
    header, samples = train("--dataload", "pad", "--loss_mask", "none")
    assert f"loss on all {TOTAL:,} tokens: --loss_mask none leaves {tmp_path / 'chat.mask'} aside" in header
    assert counted(samples) == TOTAL - len(ROWS)


@pytest.mark.parametrize("split, rows", [("train[:5]", 5), ("[15:]", 5)])
def test_the_rows_that_train_are_chosen_and_those_that_validate_are_all(train, tmp_path, split, rows):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:8]))
    header, samples = train(
        *("--data_file", tmp_path / "chat.jsonl", "--data_type", "sft", "--tokenizer", "bytes", "--dataload", "pad"),
        *("--sft_split", split, "--val_data", few, "--retain_data", few),
    )
    assert len(samples) == rows
    assert "validation on 8 samples" in header and "measured on 8 samples" in header


def test_data_of_another_tokenizer_than_the_base_is_said(train, tmp_path):
    (tmp_path / "own.txt").write_text("1 'a' 1\n")
    record = vocabulary_of(load_tokenizer(tmp_path / "own.txt"))
    (tmp_path / "config.json").write_text(json.dumps({"vocabulary": record._asdict()}))
    header, _ = train("--dataload", "pad")
    assert header.count("note:") == 1
    assert "note: the data was made with bytes (257 tokens" in header and "own.txt (2 tokens" in header


@pytest.mark.parametrize("micro_bsz", [1, 4])
def test_rows_are_read_in_another_order_in_every_epoch_and_not_by_length(train, micro_bsz):
    _, samples = train("--dataload", "pad", "--micro_bsz", micro_bsz)
    epochs = [[samples[20 * epoch + i][0].tolist() for i in range(20)] for epoch in range(4)]
    assert all(sorted(rows) == sorted(epochs[0]) for rows in epochs)
    assert len({str(rows) for rows in epochs}) == 4
    if micro_bsz == 1:
        assert not any(rows == sorted(rows, key=len) for rows in epochs)


@pytest.mark.parametrize("kind", ["binidx", "sft"])
@pytest.mark.parametrize("dataload", ["pad", "pack", "get"])
def test_samples_are_shown_and_nothing_trains(train, tmp_path, monkeypatch, kind, dataload):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ["--dataload", dataload, "--show_samples", 2, "--data_shuffle", 0]
    if kind == "sft":
        flags += ["--data_file", tmp_path / "chat.jsonl", "--data_type", "sft", "--tokenizer", "bytes"]
    monkeypatch.setattr(run, "make_model", None)
    shown, samples = train(*flags)
    assert samples is None and not (tmp_path / "out").exists()
    first = 10 if dataload == "pack" else 0  # which fills rows with the longest first
    assert f"User: {first} birds?\n\nAssistant:[[ {first}!<end>]]" in shown
    assert "sample 2" in shown and "sample 3" not in shown and "model  " not in shown


@pytest.mark.parametrize("dataload, same", [("get", True), ("pad", False)])
def test_resuming_refuses_a_change_of_rows_that_changes_the_order(train, monkeypatch, dataload, same):
    seen = []
    monkeypatch.setattr(inputs, "find_state", lambda folder, settings, identity: seen.append(identity) or (None, None))
    for micro_bsz in (1, 2, 4):
        train("--dataload", dataload, "--micro_bsz", micro_bsz)
    alone, two, four = (identity["data"] for identity in seen)
    assert two == four and (alone == two) is same


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--warmup_steps", 500), "note: --warmup_steps 500 do not end by then: the rate stays below --lr_init"),
        (("--warmup_steps", 500, "--lr_schedule", "rwkv-peft"), ""),  # which has no warm-up
        (("--warmup_steps", 1), ""),
        (("--lr_init", 100), "note: 100 moves each number by about as much in a step; rates are far below 1"),
        (("--lr_init", 1, "--peft", "none", "--train_parts", "state"), ""),  # which is usual
    ],
)
def test_rates_that_nobody_means_are_told_before_the_run(train, flags, words):
    header, _ = train("--dataload", "pad", *flags)
    assert (words or "steps ") in header and ("note:" in header) == bool(words)


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(train, tmp_path, tiny_state):
    save_model(tmp_path / "small.pth", tiny_state(vocab_size=256))  # and ASCII stays below
    with pytest.raises(UserError, match=r"chat was made with bytes \(257 tokens, .*, and the model has 256 tokens"):
        train("--load_model", tmp_path / "small.pth")


def test_a_tokenizer_of_far_fewer_tokens_than_the_model_has_is_told(train, tmp_path, tiny_state):
    tokens = [chr(byte) if byte < 128 else bytes([byte]) for byte in range(256)] + [f"{i + 100}!" for i in range(255)]
    (tmp_path / "own.txt").write_text("".join(f"{i} {token!r} {len(token)}\n" for i, token in enumerate(tokens, 1)))
    argv = ("preprocess", tmp_path / "chat.jsonl", "--output", tmp_path / "own", "--tokenizer", tmp_path / "own.txt")
    assert commands.main([str(word) for word in argv]) == 0
    said = r"note: the data was made with .*own.txt \(512 tokens, .*, and it lacks most of the model's 65,536 tokens"
    for vocab_size, told in ((65536, True), (1024, True), (1000, False)):
        save_model(tmp_path / "other.pth", tiny_state(vocab_size=vocab_size, n_layer=1, n_embd=16))
        header, _ = train("--load_model", tmp_path / "other.pth", "--data_file", tmp_path / "own", "--dataload", "pad")
        assert bool(re.search(said.replace("65,536", f"{vocab_size:,}"), header)) == told == ("note:" in header)


def test_a_tokenizer_that_is_not_the_models_is_refused_before_rows_are_read(train, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="--tokenizer world has 65,536 tokens, and the model 257"):
        train("--data_type", "sft", "--data_file", tmp_path / "chat.jsonl")
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_state):
    """A folder with base.pth, whose 300 tokens identify no tokenizer, data of bytes, and out/, a merged run on them."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_model(folder / "base.pth", tiny_state(vocab_size=300))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"{i} birds"}) + "\n" for i in range(8)))
    assert commands.main(f"preprocess {folder}/rows.jsonl --output {folder}/data --tokenizer bytes".split()) == 0
    flags = (
        f"--load_model {folder}/base.pth --data_file {folder}/data --proj_dir {folder}/out --bone_r 16 --ctx_len 8 "
        "--dataload pad --epoch_steps 1 --accelerator cpu --precision fp32"
    )
    out, _ = finish(start([sys.executable, str(ROOT / "train.py"), *flags.split()]))
    assert "tokenizer bytes (257 tokens" in out
    files = f"--base_model {folder}/base.pth --bone_checkpoint {folder}/out/adapter.safetensors"
    assert commands.main(f"merge {files} --output {folder}/out/merged.pth".split()) == 0
    return folder


def test_the_runs_config_names_it(trained):
    assert read_record(trained / "out" / "config.json") == vocabulary_of(load_tokenizer("bytes"))
    assert json.loads((trained / "out" / "config.json").read_text())["adapter"]["method"] == "bone"


def test_a_name_in_a_file_is_told_in_one_line():
    assert str(Vocabulary("\x1b[31mworld\nerror: forged", "0\n", 3)).isprintable()


def test_an_adapter_tells_how_it_came_to_be(trained, capsys, tiny_state):
    assert commands.main(["inspect", str(trained / "out")]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["base"].startswith("base.pth, fingerprint ") and told["tokenizer"].startswith("bytes (257 tokens, ")
    assert told["data"] == "--data_type binidx --dataload pad --loss_mask none --ctx_len 8"
    assert told["rate"] == "0.0013 to 0.00013, cosine" and told["versions"].startswith("rwkv_peft 0")
    save_model(trained / "other.pth", tiny_state(vocab_size=300, seed=1))
    merge = f"merge --base_model {trained}/other.pth --bone_checkpoint {trained}/out --output {trained}/x.pth"
    with pytest.raises(UserError, match="was trained on another base: base.pth, fingerprint"):
        commands.main(merge.split())


@pytest.mark.parametrize(
    "model", [["--model", "base.pth", "--adapter", "out/adapter.safetensors"], ["--model", "out/merged.pth"]]
)
def test_generate_takes_it_from_the_run(trained, model, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    arguments = ["generate", *model, "--prompt", "1 b", "--max_tokens", "2"]
    assert commands.main(arguments) == 0
    assert "note:" not in capsys.readouterr().err
    (trained / "own.txt").write_text("1 'a' 1\n98 'b' 1\n")
    assert commands.main([*arguments[:-4], "--prompt", "b", "--max_tokens", "2", "--tokenizer", "own.txt"]) == 0
    assert "note: the run was trained with bytes (257 tokens" in capsys.readouterr().err


def test_validation_data_of_another_tokenizer_is_refused(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    (trained / "words.txt").write_text("".join(f"{i + 1} {chr(i)!r} 1\n" for i in range(32, 128)))
    for tokenizer in ("bytes", "words.txt"):
        command = f"preprocess rows.jsonl --output held-{tokenizer} --tokenizer {tokenizer}"
        assert commands.main(command.split()) == 0
    flags = "--load_model base.pth --data_file data --bone_r 16 --ctx_len 8 --dataload pad --show_samples 1".split()
    for flag in ("--val_data", "--retain_data"):
        assert commands.main(["train", *flags, flag, "held-bytes"]) == 0
        with pytest.raises(UserError, match=f"{flag} held-words.txt was made with .*, and --data_file data with"):
            commands.main(["train", *flags, flag, "held-words.txt"])
