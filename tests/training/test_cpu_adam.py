"""Building DeepSpeed's Adam: a failure's reason is reported, and the lock of a killed build is removed."""

from pathlib import Path

import pytest
from deepspeed.ops import adam
from torch.utils.cpp_extension import _get_build_directory

from rwkv_peft.cli.errors import UserError
from rwkv_peft.training.optimizers.cpu_adam import cpu_adam

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


def test_a_lock_that_a_killed_build_left_is_removed(monkeypatch, tmp_path):
    """torch's build waits for it forever."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = Path(_get_build_directory("cpu_adam", verbose=False)) / "lock"
    lock.touch()

    class Built(Exception):
        pass

    def build(groups, **settings):
        assert not lock.exists()
        raise Built

    monkeypatch.setattr(adam, "DeepSpeedCPUAdam", build)
    with pytest.raises(Built):
        cpu_adam([])
