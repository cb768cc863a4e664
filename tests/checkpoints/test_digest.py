"""Digests of whole files: equal for equal contents, computed once, and computed anew if a file changes."""

import os

import pytest

from rwkv_peft.checkpoints import digest
from rwkv_peft.checkpoints.digest import digest_below, digest_of


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """The files that were read whole, in order; every file is treated as large, and none as new."""
    read, real = [], digest.sha256_of
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "LARGE", 1)
    monkeypatch.setattr(digest, "SETTLED", -1.0)
    monkeypatch.setattr(digest, "sha256_of", lambda path: read.append(path.name) or real(path))
    return read


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.bin").write_bytes(b"abc" * 1000)
    return tmp_path / "data" / "a.bin"


def test_a_digest_is_made_once_and_told_apart_by_size_and_time(data, reads):
    first = digest_of(data)
    assert digest_of(data) == first and reads == ["a.bin"]
    os.utime(data, ns=(0, 1))
    assert digest_of(data) == first and len(reads) == 2
    content = data.read_bytes()
    data.write_bytes(content[:-1] + b"d")  # at another time
    assert digest_of(data) != first
    os.utime(data, ns=(0, 1))
    data.write_bytes(content + b"d")
    os.utime(data, ns=(0, 1))
    assert digest_of(data) != first and len(reads) == 4
    data.write_bytes(content)
    assert digest_of(data) == first


def test_a_cache_that_cannot_be_written_costs_time_alone(data, reads, monkeypatch, tmp_path):
    (tmp_path / "cache").touch()
    assert digest_of(data) == digest_of(data) and reads == ["a.bin"] * 2
    assert [path.name for path in data.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize(
    "kept", ["", "[]", "{}", '{"bytes": 3000}', "null", '"' + "x" * 99, '{"sha256": 5}', "[" * 9999]
)
def test_a_damaged_record_is_passed_over(data, reads, tmp_path, kept):
    first = digest_of(data)
    (record,) = tmp_path.glob("cache/rwkv_peft/digests/*.json")
    record.write_text(kept)
    assert digest_of(data) == first and len(reads) == 2


def test_small_and_new_files_leave_nothing(data, reads, monkeypatch, tmp_path):
    monkeypatch.setattr(digest, "SETTLED", 1000.0)
    digest_of(data)
    monkeypatch.setattr(digest, "SETTLED", -1.0)
    monkeypatch.setattr(digest, "LARGE", 1 << 26)
    digest_of(data)
    assert not list(tmp_path.glob("cache/rwkv_peft/digests/*"))


def test_a_folder_is_told_by_the_names_and_contents_of_its_files(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("b" if name == "three" else "a")).write_text("abc")
    one, two, three = (digest_below(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two != three and digest_of(tmp_path / "one") == "" == digest_of(tmp_path / "absent")
    (tmp_path / "two" / "a").write_text("abd")
    assert digest_below(tmp_path / "two") != one
