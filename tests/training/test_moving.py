"""A run that goes on on other ranks and another stage is the run that would have been, but for the order of sums."""

import pytest
import torch

from rwkv_peft.config import DataConfig, TrainConfig
from rwkv_peft.errors import UserError
from rwkv_peft.training.saving.checkpoints import find_checkpoint
from rwkv_peft.training.saving.optimizer_files import SavedOptimizer
from rwkv_peft.training.saving.resume import with_kept_order, with_kept_steps
from rwkv_peft.training.saving.run_state import write_state
from training.runs import metrics

FLAGS = (
    *"--epoch_steps 2 --epoch_count 3 --lr_schedule constant --train_parts ln --dataload pad".split(),
    *("--lora_config", '{"lora_r":4,"lora_alpha":8,"lora_dropout":0.3}', "--peft", "lora"),
)
# (ranks, stage): the first begins, and each goes on from the one before
MOVES = {"fp32": ((2, 3), (1, 1), (2, 2)), "bf16": ((1, 2), (2, 3), (1, 1))}


def flags(precision, ranks, stage):
    machine = ("--devices", str(ranks), "--strategy", f"deepspeed_stage_{stage}")
    return (*FLAGS, "--precision", precision, "--micro_bsz", "1", *machine)


def state_of(folder):
    """{(kind, name): values} of the optimizer in a run's newest checkpoint."""
    found = SavedOptimizer(find_checkpoint(folder)).found
    return {place: torch.cat([part for _, part in sorted(parts, key=lambda p: p[0])]) for place, parts in found.items()}


@pytest.mark.parametrize("precision, most", [("fp32", 1e-5), ("bf16", 0.02)])
def test_a_run_that_moves_is_the_run_that_stayed(files, train, precision, most):
    stayed, moved = f"stayed-{precision}", f"moved-{precision}"
    train(stayed, *flags(precision, 1, 1), "--accumulate_grad_batches", "2")
    told = ""
    for number, (ranks, stage) in enumerate(MOVES[precision], 1):
        given = ("--accumulate_grad_batches", str(2 // ranks)) if number == 1 else ("--resume",)
        told += train(moved, *flags(precision, ranks, stage), "--epoch_count", str(number), *given)[0]
    assert told.count("so that a step on 1 rank takes 2 samples, as before on 2") == 1
    lines = [[line["loss"] for line in metrics(files, name)] for name in (stayed, moved)]
    assert lines[1] == pytest.approx(lines[0], rel=most) and len(lines[1]) == 6
    (ours, steps), (theirs, other) = ((state_of(files / name), name) for name in (moved, stayed))
    assert ours.keys() == theirs.keys()
    for place, tensor in ours.items():
        off = (tensor - theirs[place]).norm() / theirs[place].norm()
        assert off < 20 * most, (place, float(off))
    assert all(SavedOptimizer(find_checkpoint(files / name)).steps == 6 for name in (steps, other))


def kept_steps(tmp_path, state, micro_bsz, ranks, **settings):
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True, exist_ok=True)
    write_state(folder / "state.json", {"samples_seen": 8, **state})
    train = TrainConfig(proj_dir=str(tmp_path), resume="must", **settings)
    kept, meant_for, notes = with_kept_steps(train, micro_bsz, ranks)
    return kept.accumulate_grad_batches, meant_for, notes


def test_a_step_keeps_its_samples_on_other_ranks(tmp_path):
    eight = {"row_groups": 8, "step_samples": 32}
    passes, meant_for, notes = kept_steps(tmp_path, eight, 4, 4)
    note = "note: --accumulate_grad_batches 2, so that a step on 4 ranks takes 32 samples, as before on 8"
    assert (passes, meant_for, notes) == (2, 8, [note])
    assert kept_steps(tmp_path, eight, 4, 8, accumulate_grad_batches=3) == (3, 8, [])  # the flags decide
    assert kept_steps(tmp_path, eight, 4, 4, accumulate_grad_batches=5, fresh_optimizer=True) == (5, 4, [])
    assert kept_steps(tmp_path, {"world_size": 8}, 4, 4) == (1, 4, [])  # of 0.2.0
    moved = eight | {"row_groups": meant_for}  # goes on on four again, by the same flags, and then on eight
    assert kept_steps(tmp_path, moved, 4, 4) == (2, 8, notes) and kept_steps(tmp_path, moved, 4, 8) == (1, 8, [])
    with pytest.raises(UserError, match="32 samples, and 2 ranks of --micro_bsz 3 do not divide .*give --micro_bsz 2,"):
        kept_steps(tmp_path, eight, 3, 2)
    with pytest.raises(UserError, match="and 5 ranks of .*take a number of ranks that divides it, or"):
        kept_steps(tmp_path, eight, 4, 5)


def test_a_run_keeps_its_order_of_rows_whatever_its_batches(tmp_path):
    alone = DataConfig(micro_bsz=1)
    kept_steps(tmp_path, {"data": {"rows_share_batches": True}}, 1, 1)
    assert with_kept_order(alone, TrainConfig(proj_dir=str(tmp_path), resume="must")).buckets
    assert with_kept_order(alone, TrainConfig(proj_dir=str(tmp_path))) == alone and not alone.buckets
