"""A document is read whole or refused, and its parts are all of it, none longer than asked."""

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.tools.study.questions import MOST, cut, read_document

TEXT = "One. Two three.\nFour\n\n" + "five " * 30 + "\n\n" + "six" * 40 + "\n\nSeven is 7. Eight is 8.\n"


@pytest.mark.parametrize("most", [16, 20, 33, 64, 1000])
def test_parts_are_the_document_and_no_longer_than_asked(most):
    parts = cut(TEXT, most, len)
    assert all(0 < len(part) <= most for part in parts)
    assert "".join("".join(parts).split()) == "".join(TEXT.split())
    assert len(parts) <= 2 * -(-len(TEXT) // most) + 2  # they are as long as borders let them be


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
