"""Ranks that share rows, by the command that a user types: the losses of one rank, resumed bitwise, refused clearly."""

import pytest
from safetensors.torch import load_file

from training.held import held
from training.runs import finish, metrics, start_ranks, wait_for_steps

PLAIN = ("--precision", "fp32", "--micro_bsz", "2", "--val_split", "0.1", "--random_seed", "3")
PACKED = ("--dataload", "pack", "--ctx_len", "80", "--train_parts", "state", "ln", "--accumulate_grad_batches", "2")
WHOLE = ("--peft", "none", "--epoch_steps", "1", "--epoch_count", "1")
SHARED = ("--context_parallel", "2", "--devices", "2")


def agree(mine, theirs, rel):
    assert len(mine) == len(theirs) > 0
    for ours, other in zip(mine, theirs):
        for key in {"loss", "grad_norm", "val_loss", "samples"} & other.keys():
            assert ours[key] == pytest.approx(other[key], rel=rel), key


@pytest.mark.parametrize(
    "more, shared",
    [
        (WHOLE, ("--strategy", "deepspeed_stage_2")),  # whose gradients would show another order on another rank
        (PACKED, ("--strategy", "deepspeed_stage_1", "--grad_cp", "1")),
        (PACKED, ("--train_type", "infctx", "--chunk_ctx", "22", "--strategy", "deepspeed_stage_2")),
    ],
    ids=["whole model", "packed", "packed, segments"],
)
def test_ranks_that_share_rows_train_as_one_does(files, train, more, shared):
    name = f"one-{len(more)}"
    if not (files / name).exists():
        train(name, *PLAIN, *more)
    out, _ = train(f"shared-{len(shared)}", *PLAIN, *more, *SHARED, *shared)
    assert "2 ranks share each " in out
    agree(metrics(files, f"shared-{len(shared)}"), metrics(files, name), 1e-5 if more == WHOLE else 1e-4)


def test_a_rank_that_dies_ends_the_other_and_the_run_goes_on_with_the_same_bits(files, command, train):
    more = (*PLAIN, *PACKED, *SHARED, "--epoch_count", "3", "--save_every", "3", "--resume", "auto")
    train("unbroken", *more)
    hold = files / "hold"
    first, second = start_ranks(held(command("broken", *more), hold, 5))
    wait_for_steps(files, "broken", 5, first)
    second.kill()
    second.communicate()
    hold.unlink()
    _, err = finish(first, 76)
    assert err.count("error: ") == 1 and "rank 0 lost the connection to another rank" in err and "--resume" in err
    assert "resuming after step" in train("broken", *more)[0]
    mine, theirs = (load_file(files / name / "adapter.safetensors") for name in ("broken", "unbroken"))
    assert mine.keys() == theirs.keys() and all((mine[key] == tensor).all() for key, tensor in theirs.items())
