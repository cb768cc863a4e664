"""A .pth whose two tables of contents disagree on sizes."""

import io
import resource
import zipfile

import pytest
import torch

from rwkv_peft.checkpoints.pth import read_pth, read_tensors
from rwkv_peft.checkpoints.pth_writer import save_pth
from rwkv_peft.cli.errors import UserError


def rewritten(path, change):
    """Rewrite the archive at `path`, each record as change(name, content) returns it."""
    target = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, change(name, archive.read(name)))
    path.write_bytes(target.getvalue())


@pytest.fixture
def path(tmp_path):
    save_pth(tmp_path / "a.pth", {"a": torch.ones(32), "b": torch.full((32,), 2.0), "empty": torch.ones(0)})
    return tmp_path / "a.pth"


@pytest.mark.parametrize("save", [save_pth, lambda path, tensors: torch.save(tensors, path)], ids=["ours", "torch"])
def test_views_of_one_storage_and_empty_tensors_are_read(tmp_path, save):
    whole = torch.arange(12.0)
    tensors = {"whole": whole, "part": whole[3:7], "rows": whole.view(3, 4)[1:], "none": torch.ones(0), "copy": whole}
    save(tmp_path / "a.pth", tensors)
    for key, tensor in read_tensors(tmp_path / "a.pth").items():
        assert torch.equal(tensor, tensors[key]), key


@pytest.mark.parametrize("left", [0, 4, 127])
def test_a_record_shorter_than_its_tensor_is_not_completed_by_its_neighbour(path, left):
    rewritten(path, lambda name, content: content[:left] if name.endswith("data/0") else content)
    with pytest.raises(UserError, match="a tensor takes 128 bytes, and no record of that length is left"):
        read_tensors(path)


def test_what_is_packed_is_refused_before_it_is_unpacked(path):
    """128 MiB of zeros in a pickle of 128 KiB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data.pkl", "w") as record:
        record.write(b"\x80\x04\x8e" + (1 << 27).to_bytes(8, "little"))  # so many bytes follow
        for _ in range(1 << 7):
            record.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 18
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="is packed.*unpacks to 134,217,7.. bytes"):
        read_pth(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16  # KiB


def test_a_record_longer_than_its_file_is_refused(path):
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")  # of the archive's table: the sizes stand 20 bytes in
    content[entry + 20 : entry + 28] = (1 << 30).to_bytes(4, "little") * 2
    path.write_bytes(content)
    with pytest.raises(UserError, match="data.pkl would have 1,073,741,824 bytes, and the file has"):
        read_pth(path)
