"""DeepSpeed's files of a checkpoint: code in them is not run."""

import pytest
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from rwkv_peft.errors import UserError
from rwkv_peft.training.saving.optimizer_files import TensorsAlone
from training.runs import Planted


def test_deepspeeds_own_reader_runs_what_ours_refuses(tmp_path):
    torch.save({"step": torch.ones(2), "planted": Planted(tmp_path / "ran")}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds code or objects .*nothing of it was run"):
        TensorsAlone(None).load(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()
    TorchCheckpointEngine().load(tmp_path / "a.pt")
    assert (tmp_path / "ran").exists()
