"""A mapped file is judged anew once it was written, and refused if it has another size."""

import os

import pytest

from rwkv_peft.checkpoints.mapped import Mapped, Overwritten, Stamp


class Judged(Mapped):
    """A Mapped that counts how often its file was judged, and refuses it if it begins with "bad"."""

    def __init__(self, path):
        self.stamps, self.times = {path: Stamp.of(path)}, 0

    def judge(self, path):
        self.times += 1
        if path.read_bytes().startswith(b"bad"):
            raise Overwritten(path, "is bad")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"good")
    os.utime(path, (1e9, 1e9))  # long before: the clock of a disk goes in steps
    return path


def test_a_file_is_judged_once_each_time_that_it_is_written(file):
    found = Judged(file)
    for times, change in enumerate((lambda: None, file.touch, lambda: os.utime(file, (2e9, 2e9)))):
        change()
        found.require_unchanged()
        found.require_unchanged()
        assert found.times == times
    file.write_bytes(b"bad!")
    for _ in range(2):  # a refusal stands
        with pytest.raises(
            Overwritten, match="file was overwritten while it is read: it is bad; put the old file back"
        ):
            found.require_unchanged()


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(
    "content, words", [(b"long!", "it has 5 bytes, and had 4"), (b"bad!", "is bad"), (None, "is gone")]
)
def test_another_file_of_the_name_counts_only_if_the_name_does(file, content, words, by_name):
    found = Judged(file)
    os.replace(file, file.with_name("old"))
    if content is not None:
        file.write_bytes(content)
    if by_name:
        with pytest.raises(Overwritten, match=words):
            found.require_unchanged(by_name)
    found.require_unchanged()
