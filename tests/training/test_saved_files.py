"""A checkpoint records its files, and every way in which one may differ from its record is found."""

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.training.saving.checkpoints import record_of, require_files

NAMES = ("adapter.safetensors", "optimizer/rank-00000.safetensors")


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "optimizer").mkdir()
    for name in NAMES:
        (tmp_path / name).write_bytes(bytes(range(256)) * 8)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "change, what",
    [
        (lambda content: content[:-1], "not of the 2,048 bytes"),
        (lambda content: bytes(2048), "differs from the file that was saved: its checksum"),
        (lambda content: content[::-1], "differs from the file that was saved: its checksum"),
        (lambda content: content[:700] + bytes([content[700] ^ 16]) + content[701:], "differs from the file"),
    ],
    ids=["truncated", "zeros", "foreign", "flipped"],
)
def test_damage_is_told_with_the_older_checkpoint_as_the_remedy(checkpoint, name, change, what):
    records = {name: record_of(checkpoint / name) for name in NAMES}
    require_files(checkpoint, records, fresh_optimizer=False, contents=True)
    (checkpoint / name).write_bytes(change((checkpoint / name).read_bytes()))
    with pytest.raises(UserError, match=f"{name} .*{what}.*delete {checkpoint} to resume from an older") as error:
        require_files(checkpoint, records, fresh_optimizer=False, contents=True)
    assert ("--fresh_optimizer" in str(error.value)) == ("/" in name)
    if "/" in name:
        require_files(checkpoint, records, fresh_optimizer=True, contents=True)
