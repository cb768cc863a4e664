"""Files that are chosen in the browser come into the page's folder, and replace nothing there."""

import os

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.tools.ui.files import LONGEST, MOST, Uploads, cleaned


@pytest.mark.parametrize(
    "name, kept",
    [
        ("rows.jsonl", "rows.jsonl"),
        ("表 格 (2).csv", "表 格 (2).csv"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\rows.txt", "rows.txt"),
        (".bashrc", "bashrc"),
        ("-rf $(x)`y`\n\x1b\u202e.txt", "rf _(x)_y____.txt"),
        ("a" * 300 + ".parquet", "a" * (LONGEST - len("parquet")) + ".parquet"),
        ("文" * 300, "文" * LONGEST),
    ],
)
def test_names_are_cleaned(name, kept):
    assert cleaned(name) == kept and len(os.fsencode(f"{kept}-99.part")) <= 255


@pytest.mark.parametrize("name", ["", "..", "a/", "/", ".-_ "])
def test_a_file_without_a_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="rename it"):
        Uploads(tmp_path).take(name, 0, 1, b"a")
    assert not list(tmp_path.iterdir())


def test_parts_become_a_file_that_replaces_none(tmp_path):
    uploads = Uploads(tmp_path)
    (tmp_path / "rows.jsonl").write_text("mine")
    (tmp_path / "rows-2.jsonl").symlink_to(tmp_path / "elsewhere")
    assert uploads.take("rows.jsonl", 0, 9, b"dropped") == ""  # an upload that ended on the way
    for begin, name in ((0, ""), (3, ""), (6, "rows-3.jsonl")):
        assert uploads.take("rows.jsonl", begin, 9, b"abc") == name
    assert (tmp_path / "rows-3.jsonl").read_bytes() == b"abcabcabc" and (tmp_path / "rows.jsonl").read_text() == "mine"
    assert uploads.take("empty", 0, 0, b"") == "empty" and uploads.take("empty", 0, 0, b"") == "empty-2"
    assert not (tmp_path / "elsewhere").exists() and not list(uploads.folder.iterdir())


def test_parts_that_do_not_follow_and_too_large_files_are_refused(tmp_path, monkeypatch):
    uploads = Uploads(tmp_path)
    for begin, size in ((0, MOST + 1), (0, 2), (-1, 3), (1, 3)):
        with pytest.raises(UserError, match=f"at most {MOST >> 30} GiB|another tab"):
            uploads.take("a", begin, size, b"abc" if size < MOST else b"a")
    with pytest.raises(UserError, match="at most"):
        uploads.take("a", 0, 3, b"")
    uploads.take("a", 0, 3, b"a")
    with pytest.raises(UserError, match="another tab"):
        uploads.take("a", 2, 3, b"c")
    monkeypatch.setattr("rwkv_peft.checkpoints.atomic.room_at", lambda path: 2)
    with pytest.raises(UserError, match="free some space"):
        uploads.take("a", 0, 3, b"a")
    assert not (tmp_path / "a").exists()


def test_no_link_or_pipe_that_came_with_a_folder_is_followed(tmp_path):
    outside, uploads = tmp_path / "outside", Uploads(tmp_path / "files")
    outside.write_text("mine")
    uploads.folder.mkdir(parents=True)
    (uploads.folder / "a.part").symlink_to(outside)
    with pytest.raises(OSError):
        uploads.take("a", 4, 5, b"x")
    os.mkfifo(uploads.folder / "b.part")
    with pytest.raises(OSError):  # and not waited for
        uploads.take("b", 4, 5, b"x")
    assert uploads.take("a", 0, 1, b"x") == "a" and outside.read_text() == "mine"
    uploads.folder.rename(tmp_path / "moved")
    uploads.folder.symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match="by a link"):
        uploads.take("b", 0, 1, b"x")
