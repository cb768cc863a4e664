"""Building DeepSpeed's Adam: a failure's reason is reported; the lock of a killed build is removed, and that of a
running build is not."""

import pytest

from rwkv_peft.errors import UserError
from rwkv_peft.training.optimizers.cpu_adam import cpu_adam, remove_stale_lock


def test_a_lock_counts_while_a_process_has_it_open(tmp_path):
    lock = tmp_path / "lock"
    with open(lock, "x"):
        remove_stale_lock(lock)
        assert lock.exists()
    remove_stale_lock(lock)
    assert not lock.exists()


def test_no_lock_is_no_matter(tmp_path):
    remove_stale_lock(tmp_path / "lock")
    assert not list(tmp_path.iterdir())


WORDS = "an offload strategy needs DeepSpeed's Adam for the CPU, which cannot be built here: "


def test_offload_without_a_compiler_says_what_it_needs(train, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new"))
    monkeypatch.setenv("PATH", str(tmp_path))
    out, err = train("lacks", "--strategy", "deepspeed_stage_2_offload", code=2)
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {WORDS}") and "apt install g++" in line and "Traceback" not in err
    assert "compiling DeepSpeed's Adam" in out


def test_a_folder_of_extensions_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=f"{WORDS}.*Not a directory.*TORCH_EXTENSIONS_DIR"):
        cpu_adam([])
