"""Rows in segments, and rows that ranks share, by the command that a user types: the losses and gradient norms of whole
rows on one rank, with packing, tuned states, validation and masks; resumed bitwise."""

import pytest
from safetensors.torch import load_file

from training.runs import metrics, rewound

CUT = ("--train_type", "infctx", "--chunk_ctx", "11")
PLAIN = ("--precision", "fp32", "--epoch_count", "1")
PACKED = ("--precision", "fp32", "--dataload", "pack", "--ctx_len", "80", "--train_parts", "state", "ln")
PACKED += ("--loss_mask", "qa", "--mask_id", "30", "--mask_end_id", "60", "--lr_schedule", "constant")
PACKED += ("--val_split", "0.2", "--strategy", "deepspeed_stage_2")
ROWS = ("--precision", "fp32", "--micro_bsz", "2", "--val_split", "0.1", "--random_seed", "3")
PIECES = ("--dataload", "pack", "--ctx_len", "80", "--train_parts", "state", "ln", "--accumulate_grad_batches", "2")
WHOLE = ("--peft", "none", "--epoch_steps", "1", "--epoch_count", "1")
SHARED = ("--context_parallel", "2", "--devices", "2")


@pytest.fixture(scope="module")
def whole(files, train):
    train("whole", *PLAIN, "--micro_bsz", "4")
    return metrics(files, "whole")


@pytest.fixture(scope="module")
def packed(files, train):
    """The metrics of a run over packed rows in segments."""
    out, _ = train("packed", *PACKED, *CUT)
    assert "computed in segments of 11 tokens, the state carried over" in out
    return metrics(files, "packed")


def agree(mine, theirs, rel, same="tokens"):
    assert len(mine) == len(theirs) and sum((line["loss"] or 0) > 0 for line in theirs) > len(theirs) / 2
    for ours, other in zip(mine, theirs):
        assert ours[same] == other[same]
        for key in {"loss", "grad_norm", "val_loss"} & other.keys():
            expected = other[key]  # None where no token counts
            assert ours[key] == (expected if expected is None else pytest.approx(expected, rel=rel)), key


@pytest.mark.parametrize(
    "more",
    [
        ("--micro_bsz", "4", "--strategy", "deepspeed_stage_1"),
        ("--strategy", "deepspeed_stage_3", "--devices", "2", "--accumulate_grad_batches", "2", "--grad_cp", "1"),
    ],
    ids=["stage 1", "stage 3, two ranks"],
)
def test_segments_train_as_whole_rows_do(files, train, whole, more):
    name = f"cut-{len(more)}"
    train(name, *PLAIN, *CUT, *more)
    agree(metrics(files, name), whole, 1e-3)
    expected = load_file(files / "whole" / "adapter.safetensors")
    for key, tensor in load_file(files / name / "adapter.safetensors").items():
        assert (tensor - expected[key]).norm() <= 2e-2 * expected[key].norm(), key


def test_ranks_whose_documents_take_other_numbers_of_segments_keep_step_under_stage_3(files, train):
    """They give the metrics of stage 2, whose ranks need not keep step; a run that hangs is ended."""
    more = (*PLAIN, *CUT[:2], "--chunk_ctx", "16", "--dataload", "only", "--ctx_len", "96", "--bone_mode", "bone")
    more += ("--devices", "2", "--epoch_steps", "2")
    for stage in ("2", "3"):
        train(f"unequal-{stage}", *more, "--strategy", f"deepspeed_stage_{stage}", timeout=120)
    agree(metrics(files, "unequal-3"), metrics(files, "unequal-2"), 1e-4)


def test_packed_rows_with_tuned_states_and_validation_do_too(files, train, packed):
    train("packed-whole", *PACKED)
    agree(packed, metrics(files, "packed-whole"), 1e-3)
    assert "val_loss" in packed[3]


def test_a_resumed_run_has_the_bits_of_a_whole_one(files, train, packed):
    rewound(files / "packed", "resumed")
    train("resumed", *PACKED, *CUT, "--resume")
    first, second = (load_file(files / name / "adapter.safetensors") for name in ("packed", "resumed"))
    assert all((first[key] == tensor).all() for key, tensor in second.items()) and first.keys() == second.keys()


@pytest.mark.parametrize(
    "more, shared",
    [
        (WHOLE, ("--strategy", "deepspeed_stage_2")),  # whose gradients would show another order on another rank
        (PIECES, ("--strategy", "deepspeed_stage_1", "--grad_cp", "1")),
        (PIECES, ("--train_type", "infctx", "--chunk_ctx", "22", "--strategy", "deepspeed_stage_2")),
    ],
    ids=["whole model", "packed", "packed, segments"],
)
def test_ranks_that_share_rows_train_as_one_does(files, train, more, shared):
    name = f"one-{len(more)}"
    if not (files / name).exists():
        train(name, *ROWS, *more)
    out, _ = train(f"shared-{len(shared)}", *ROWS, *more, *SHARED, *shared)
    assert "2 ranks share each " in out
    agree(metrics(files, f"shared-{len(shared)}"), metrics(files, name), 1e-5 if more == WHOLE else 1e-4, "samples")


def test_a_run_of_shared_rows_resumes_bitwise(files, train):
    more = (*ROWS, *PIECES, *SHARED, "--lr_schedule", "constant")
    train("shared", *more)
    rewound(files / "shared", "shared-again")
    assert "resuming after step" in train("shared-again", *more, "--resume")[0]
    first, second = ((files / name / "adapter.safetensors").read_bytes() for name in ("shared", "shared-again"))
    assert first == second
