"""Ranks that share rows, by the command that a user types: the losses of one rank, resumed bitwise, refused clearly."""

import pytest
from safetensors.torch import load_file

from training.runs import metrics

PLAIN = ("--precision", "fp32", "--micro_bsz", "2", "--val_split", "0.1", "--random_seed", "3")
PACKED = ("--dataload", "pack", "--ctx_len", "80", "--train_parts", "state", "ln", "--accumulate_grad_batches", "2")
SHARED = ("--context_parallel", "2", "--devices", "2")


def agree(mine, theirs, rel=1e-3):
    assert len(mine) == len(theirs) > 0
    for ours, other in zip(mine, theirs):
        for key in {"loss", "grad_norm", "val_loss", "samples"} & other.keys():
            assert ours[key] == pytest.approx(other[key], rel=rel), key


@pytest.mark.parametrize(
    "more, shared",
    [
        ((), ("--strategy", "deepspeed_stage_1")),
        (PACKED, ("--strategy", "deepspeed_stage_2", "--grad_cp", "1")),
        (PACKED, ("--train_type", "infctx", "--chunk_ctx", "22", "--strategy", "deepspeed_stage_2")),
    ],
    ids=["stage 1", "packed, stage 2", "packed, segments"],
)
def test_ranks_that_share_rows_train_as_one_does(files, train, more, shared):
    name = f"one-{len(more)}"
    if not (files / name).exists():
        train(name, *PLAIN, *more)
    out, _ = train(f"shared-{len(shared)}", *PLAIN, *more, *SHARED, *shared)
    assert "2 ranks share each " in out
    agree(metrics(files, f"shared-{len(shared)}"), metrics(files, name))
