"""A run that goes on on other ranks and another stage is the run that would have been, but for the order of sums."""

import pytest
import torch

from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import DataConfig, TrainConfig
from rwkv_peft.training.flags.parser import parser_of_train
from rwkv_peft.training.flags.request import parse_flags
from rwkv_peft.training.ranks.world import World, fit
from rwkv_peft.training.saving.checkpoints import find_checkpoint, write_state
from rwkv_peft.training.saving.optimizer_state import SavedOptimizer
from rwkv_peft.training.saving.resume import with_kept_order
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
    assert told.count("--accumulate_grad_batches 2: a step has 2 samples in the run in") == 1
    lines = [[line["loss"] for line in metrics(files, name)] for name in (stayed, moved)]
    assert lines[1] == pytest.approx(lines[0], rel=most) and len(lines[1]) == 6
    (ours, steps), (theirs, other) = ((state_of(files / name), name) for name in (moved, stayed))
    assert ours.keys() == theirs.keys()
    for place, tensor in ours.items():
        off = (tensor - theirs[place]).norm() / theirs[place].norm()
        assert off < 20 * most, (place, float(off))
    assert all(SavedOptimizer(find_checkpoint(files / name)).steps == 6 for name in (steps, other))


# a run's first machine and batch, and those that it goes on with: a step and the run keep their samples
OTHERS = (
    ("--micro_bsz 4", "--micro_bsz 2"),
    ("--micro_bsz 1 --accumulate_grad_batches 4", "--micro_bsz 4"),
    ("--micro_bsz 2 --accumulate_grad_batches 2", "--micro_bsz 2 --accumulate_grad_batches 3"),
    (
        "--devices 2 --context_parallel 2 --micro_bsz 2",  # 2 ranks share each row, and then 4: one group both times
        "--devices 4 --context_parallel 4 --micro_bsz 1",
    ),
)


@pytest.mark.parametrize("first, then", OTHERS)
def test_a_run_that_goes_on_with_other_batches_keeps_its_samples(files, train, first, then):
    name = f"batches-{OTHERS.index((first, then))}"
    common = ("--precision", "fp32", "--epoch_steps", "4")
    train(name, *common, *first.split(), "--epoch_count", "1")
    size = metrics(files, name)[0]["samples"]
    train(name, *common, *then.split(), "--epoch_count", "2", "--resume")
    assert [line["samples"] for line in metrics(files, name)] == [size * step for step in range(1, 9)]


def save_state(tmp_path, state):
    """Write the state.json of a checkpoint in a run's folder."""
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True, exist_ok=True)
    write_state(folder / "state.json", {"samples_seen": 8, **state})


def kept_steps(tmp_path, micro_bsz, ranks, *more):
    where = ("--load_model", "x", "--data_file", "x", "--proj_dir", str(tmp_path), "--resume")
    given = ("--micro_bsz", str(micro_bsz), "--devices", str(ranks), *more)
    args, _ = parser_of_train().parse_with_mistakes([*where, *given])
    notes = fit(args, World(1, ranks))
    return args.accumulate_grad_batches, notes


def test_a_step_keeps_its_samples_on_other_ranks(tmp_path):
    save_state(tmp_path, {"step_samples": 32})
    note = f"--accumulate_grad_batches 2: a step has 32 samples in the run in {tmp_path}"
    assert kept_steps(tmp_path, 4, 4) == (2, [note]) and kept_steps(tmp_path, 4, 8) == (1, [])
    assert kept_steps(tmp_path, 4, 8, "--accumulate_grad_batches", "3")[0] == 1
    assert kept_steps(tmp_path, 4, 4, "--accumulate_grad_batches", "5", "--fresh_optimizer") == (5, [])
    assert kept_steps(tmp_path, 4, 8, "--context_parallel", "2")[0] == 2
    with pytest.raises(UserError, match="32 samples in the run in .*, and 2 ranks of --micro_bsz 3 .*--micro_bsz 2,"):
        kept_steps(tmp_path, 3, 2)
    with pytest.raises(UserError, match="and 5 ranks of .*take a number of ranks that divides them, or"):
        kept_steps(tmp_path, 4, 5)
    save_state(tmp_path, {})  # of 0.2.0
    assert kept_steps(tmp_path, 4, 4) == (1, [])


def test_the_end_by_tokens_is_that_of_the_run_s_own_steps(tmp_path):
    save_state(tmp_path, {"step_samples": 32})
    where = ["--load_model", "x", "--data_file", "x", "--proj_dir", str(tmp_path), "--bone_r", "16"]
    tokens = ["--ctx_len", "16", "--my_exit_tokens", str(16 * 32 * 10), "--micro_bsz", "4"]
    assert parse_flags([*where, *tokens]).train.epoch_steps == 80
    assert parse_flags([*where, *tokens, "--resume"]).train.epoch_steps == 10


def test_a_run_keeps_its_order_of_rows_whatever_its_batches(tmp_path):
    alone = DataConfig(micro_bsz=1)
    save_state(tmp_path, {"data": {"rows_share_batches": True}})
    assert with_kept_order(alone, TrainConfig(proj_dir=str(tmp_path), resume="must")).buckets
    assert with_kept_order(alone, TrainConfig(proj_dir=str(tmp_path))) == alone and not alone.buckets
