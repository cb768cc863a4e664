"""rwkv-peft study by the command that a user types, on the bundled demo, which knows one fact of a text at a time."""

import json
import sys

import pytest

from rwkv_peft.checkpoints.base import open_base
from rwkv_peft.checkpoints.state_file import read_states
from rwkv_peft.cli.errors import UserError
from rwkv_peft.release.convert import main as convert
from rwkv_peft.tools.study.command import MOST, Likelihood, cut, read_document, verdict
from rwkv_peft.tools.study.flags import ASK, parse_flags
from training.runs import ROOT, finish, start
from warm import CHILDREN

BASE = ROOT / "demo" / "rwkv7-demo.pth"
TEXT = "Ann has 3 red cups.\n\nEva has 7 pink pens. It rains a little.\n"
GIVEN = ("--load_model", str(BASE), "--output", "out")


@pytest.fixture
def study(tmp_path):
    def run(*words, code=0, base=BASE):
        of_base = ("--load_model", base, "--tokenizer", "bytes", "--precision", "fp32", "--accelerator", "cpu")
        argv = [sys.executable, CHILDREN, "rwkv_peft", "study", *words, *of_base, "--answer_rows", 0, "--micro_bsz", 4]
        return finish(start([str(word) for word in argv]), code)

    return run


def test_a_document_is_asked_about_and_learned(tmp_path, study):
    (tmp_path / "text.txt").write_text(TEXT)
    layout = ("--ask", "Q:", "--answer", r"Q: {question}\nA:", "--stop", r"\n")
    draws = ("--part_tokens", 45, "--questions", 8, "--question_tokens", 24, "--answer_tokens", 24, *layout)
    out, _ = study(tmp_path / "text.txt", "--output", tmp_path / "out", *draws, "--epoch_count", 8, "--lr_init", 0.1)
    assert "text.txt: 2 parts of up to 45 tokens\n" in out and "teacher   the base, without what trains" in out
    rows = [json.loads(line) for line in (tmp_path / "out" / "questions.jsonl").read_text().splitlines()]
    assert {row["context"] for row in rows} == set(TEXT.strip().split("\n\n"))
    assert all(row["prompt"].startswith("Q: ") and row["prompt"].endswith("\nA:") for row in rows)
    assert len({(row["context"], row["prompt"]) for row in rows}) == len(rows)
    figures = json.loads((tmp_path / "out" / "study.json").read_text())
    with_text, before, after = (figures[name]["nats"] for name in ("with_text", "before", "after"))
    assert with_text < after < before
    assert f"without, before training   {before:.3f} nats a token, " in out
    assert f"without, after training    {after:.3f} nats a token, " in out
    assert f"learned {(before - after) / (before - with_text):.0%} of what the text before the questions tells\n" in out
    assert (tmp_path / "out" / "state.pth").exists()
    read_states(tmp_path / "out").check_base(open_base(BASE))
    _, err = study(tmp_path / "text.txt", "--output", tmp_path / "out", *draws, code=2)
    assert "--resume" in err, err
    # a person's own questions, and an adapter, on the base in a Hugging Face folder; nothing is learned at a rate of 0
    assert convert([str(BASE), str(tmp_path / "hf"), "--to", "hf", "--tokenizer", "bytes"]) == 0
    lines = [json.dumps({"context": TEXT.split("\n")[0], "question": f"{i}?", "answer": "3"}) for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    of_rows = ("--rows", tmp_path / "rows.jsonl", "--output", tmp_path / "again", "--epoch_count", 1)
    rates = ("--lr_init", 1e-12, "--lr_final", 1e-12)
    out, _ = study(*of_rows, "--peft", "bone", "--bone_r", 16, *rates, base=tmp_path / "hf")
    assert "nothing was learned: without the text the answers are no likelier than before; raise" in out


def test_a_document_that_cannot_be_learned_is_refused_before_work(tmp_path, study):
    (tmp_path / "text.txt").write_text(TEXT)
    cut_short = ("--question_tokens", 1, "--part_tokens", 45, "--ask", "Q:", "--questions", 2)
    _, err = study(tmp_path / "text.txt", "--output", tmp_path / "out", *cut_short, code=2)
    assert "text.txt: the model asked 0 questions that it answered itself, and one to learn" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (GIVEN, "takes a DOCUMENT or --rows: give one, the DOCUMENT as the first word"),
        (("d.txt", *GIVEN, "--rows", "r.jsonl"), "takes a DOCUMENT or --rows: both name what to learn from"),
        (("d.txt",), "--load_model/--model is missing"),
        (("d.txt", *GIVEN, "--answer", "A:"), r"--answer A:: it has no \{question\}"),
        (("d.txt", *GIVEN, "--data_file", "x"), "--data_file is set by rwkv-peft study, or has no use there"),
        (("d.txt", *GIVEN, "--ctx_len", "512"), "--ctx_len 512 has no room for --part_tokens 512 with a question and"),
        (
            ("d.txt", *GIVEN, "--peft", "none", "--train_parts", "ln"),
            "its teacher is the base, which has to stay as it",
        ),
        (("d.txt", *GIVEN, "--num_nodes", "2"), "NODE_RANK"),
        (("d.txt", *GIVEN, "--questoins", "2"), "there is no --questoins"),
    ],
)
def test_flags_that_do_not_go_together(argv, message):
    with pytest.raises(UserError, match=message):
        parse_flags(argv)


def test_flags_of_training_have_defaults_of_their_own():
    study = parse_flags(["d.txt", *GIVEN])
    words = " ".join(study.words)
    assert study.path.parts == ("out", "questions.jsonl") and study.ask == ASK.replace(r"\n", "\n")
    assert "--peft none --train_parts state --val_split 0.1 --ctx_len 1408" in words
    words = " ".join(parse_flags(["d.txt", *GIVEN, "--peft", "bone", "--val_data", "v", "--questions", "3"]).words)
    assert "--train_parts" not in words and "--val_split" not in words and "--questions" not in words
    words = " ".join(parse_flags(["--rows", "r.jsonl", *GIVEN, "--train_parts", "state"]).words)
    assert "--data_file r.jsonl" in words and words.count("--train_parts state") == 1 and "--peft none" in words


def test_words_on_what_was_learned():
    behind, alone = Likelihood(1.0, 1.0), Likelihood(3.0, 0.0)
    assert verdict(behind, alone, Likelihood(1.5, 0.9)) == "learned 75% of what the text before the questions tells"
    assert verdict(behind, alone, Likelihood(0.5, 1.0)).startswith("learned 100% of")
    assert verdict(behind, alone, Likelihood(2.99, 0.0)).startswith("nothing was learned")
    assert verdict(alone, behind, Likelihood(0.9, 1.0)).startswith("nothing can be learned: the text before")


PARAGRAPHS = "One. Two three.\nFour\n\n" + "five " * 30 + "\n\n" + "six" * 40 + "\n\nSeven is 7. Eight is 8.\n"


@pytest.mark.parametrize("most", [16, 20, 33, 64, 1000])
def test_parts_are_the_document_and_no_longer_than_asked(most):
    parts = cut(PARAGRAPHS, most, len)
    assert all(0 < len(part) <= most for part in parts)
    assert "".join("".join(parts).split()) == "".join(PARAGRAPHS.split())
    assert len(parts) <= 2 * -(-len(PARAGRAPHS) // most) + 2  # they are as long as borders let them be


def test_parts_end_where_a_paragraph_does():
    assert cut("One is 1.\n\nTwo is 2.\n\nThree is 3.", 24, len) == ["One is 1.\n\nTwo is 2.", "Three is 3."]
    assert cut("One is 1. Two is 2.\nThree is 3.", 24, len) == ["One is 1. Two is 2.", "Three is 3."]
    assert cut("One is 1. Two is 2.", 12, len) == ["One is 1.", "Two is 2."]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "d.txt: no such file; the first word names the document"),
        (b" \n", "d.txt holds no words, so that there is nothing to learn"),
        ("Ärger".encode("latin-1"), r"d.txt is not UTF-8 \(byte 0\); a document is a text"),
        (b"x" * (MOST + 1), "d.txt has 16,777,217 bytes, and a document 16,777,216 at most"),
    ],
    ids=("missing", "empty", "latin-1", "long"),
)
def test_documents_that_cannot_be_read(tmp_path, content, message):
    if content is not None:
        (tmp_path / "d.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_document(str(tmp_path / "d.txt"))


def test_a_document_is_read_without_its_mark(tmp_path):
    (tmp_path / "d.txt").write_bytes("\ufeffÄrger".encode())
    assert read_document(str(tmp_path / "d.txt")) == "Ärger"
    with pytest.raises(UserError, match="is a folder, and a file is due"):
        read_document(str(tmp_path))
