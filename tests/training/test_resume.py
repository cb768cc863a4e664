"""Runs that stop and go on, through the command that a user types: the same bits, on other ranks and stages the same
run but for the order of sums, or a refusal with a message."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import DataConfig
from rwkv_peft.data.token_file_writer import TokenFileWriter
from rwkv_peft.ops import products
from rwkv_peft.training.flags.parser import parser_of_train
from rwkv_peft.training.ranks.world import World, match_world
from rwkv_peft.training.saving.checkpoints import find_checkpoint, saved_state, write_state
from rwkv_peft.training.saving.optimizer_state import SavedOptimizer
from rwkv_peft.training.saving.resume import with_kept_order
from training.held import held
from training.runs import finish, metrics, rewound, start, start_ranks, wait_for_steps, wait_for_words

LONG = (
    *"--precision bf16 --micro_bsz 1 --epoch_steps 20 --epoch_count 3".split(),
    *"--strategy deepspeed_stage_2 --train_parts ln".split(),
)


@pytest.fixture(scope="module")
def unbroken(files, train):
    train("unbroken", *LONG)
    return files / "unbroken"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_resumes_bitwise(files, command, train, unbroken, number, code):
    name, hold = number.name, files / "hold"
    process = start(held(command(name, *LONG), hold, 25))
    wait_for_steps(files, name, 25, process)
    process.send_signal(number)
    if number != signal.SIGKILL:
        wait_for_words("stopping after this step", process)
    hold.unlink()
    out, _ = finish(process, code)
    done = len(metrics(files, name))
    assert done == (25 if number == signal.SIGKILL else 26)
    if number != signal.SIGKILL:
        assert "--resume" in out and (files / name / "adapter.safetensors").exists()
    out, _ = train(name, *LONG, "--resume")
    assert f"resuming after step {done if number != signal.SIGKILL else 20 * (done // 20)}" in out
    keys = ("step", "loss", "lr", "grad_norm")
    mine, theirs = ([[line[key] for key in keys] for line in metrics(files, run)] for run in (name, "unbroken"))
    assert mine == theirs
    expected = load_file(unbroken / "adapter.safetensors")
    assert all(
        torch.equal(tensor, expected[key]) for key, tensor in load_file(files / name / "adapter.safetensors").items()
    )


@pytest.mark.parametrize("strategy", ["3", "3_offload"])
def test_a_run_under_any_strategy_resumes_bitwise(files, train, strategy, quick_compiler):
    flags = ("--strategy", f"deepspeed_stage_{strategy}", "--accumulate_grad_batches", "2", "--lr_schedule", "constant")
    train(f"whole-{strategy}", *flags)
    whole, parts = files / f"whole-{strategy}", rewound(files / f"whole-{strategy}", f"parts-{strategy}")
    train(parts.name, *flags, "--resume")
    assert (whole / "adapter.safetensors").read_bytes() == (parts / "adapter.safetensors").read_bytes()


# trains as train.py does, and gets a signal while its log is closed
CLOSING = """
import os

from rwkv_peft.cli.commands import run
from rwkv_peft.training.saving.loggers import TensorBoard

close = TensorBoard.close

def signalled(self):
    close(self)
    os.kill(os.getpid(), {number:d})

TensorBoard.close = signalled
run("train")
"""


def test_a_terminal_that_goes_away_tells_more_than_once_and_the_run_saves(files, command):
    python, _, *argv = command("hung-up", "--epoch_steps", "100000")
    script = files / "closing.py"
    script.write_text(CLOSING.format(number=signal.SIGHUP))
    process = start([python, str(script), *argv])
    wait_for_steps(files, "hung-up", 5, process)
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
    finish(process, 128 + signal.SIGHUP)
    assert any((files / "hung-up" / "checkpoints").glob("step-*"))


def test_a_signal_after_the_last_step_does_not_end_a_run_before_its_picture(files, command):
    python, _, *argv = command("late", "--epoch_steps", "2", "--epoch_count", "1")
    script = files / "late.py"
    script.write_text(CLOSING.format(number=signal.SIGTERM))
    out, _ = finish(start([python, str(script), *argv]))
    assert "stopping" not in out and (files / "late" / "loss.png").exists()


def test_a_second_sigterm_has_its_exit_code(files, command):
    process = start(held(command("twice"), files / "hold", 5))
    wait_for_steps(files, "twice", 5, process)
    process.send_signal(signal.SIGTERM)
    wait_for_words("again to stop at once", process)
    process.send_signal(signal.SIGTERM)
    finish(process, 128 + signal.SIGTERM)


def test_resume_refuses_ranks_that_do_not_divide_a_step_and_a_finished_run(train, unbroken):
    _, err = train("unbroken", *LONG, "--resume", "--devices", "2", code=2)
    assert (
        "a step has 1 sample in the run in" in err
        and "and 2 ranks of" in err
        and "--fresh_optimizer" in err
        and "Traceback" not in err
    )
    _, err = train("unbroken", *LONG, "--resume", "--precision", "fp32", code=2)
    assert "has precision bf16, this command fp32" in err and "--fresh_optimizer" in err
    _, err = train("unbroken", *LONG, "--resume", code=2)
    assert "complete" in err
    _, err = train("unbroken", *LONG, code=2)
    assert "already holds a run" in err
    (unbroken / "loss.png").unlink()  # as a run leaves it that was killed after its last save
    out, _ = train("unbroken", *LONG, "--resume", "auto")
    assert "is complete" in out and (unbroken / "loss.png").exists()


def test_resume_refuses_other_data_and_a_checkpoint_with_pieces_missing(files, train, unbroken):
    more = (*LONG, "--epoch_count", "4", "--resume")
    _, err = train("unbroken", *more, "--ctx_len", "32", "--random_seed", "7", code=2)
    assert "has data {'ctx_len': 24, 'seed': 42," in err and "this command {'ctx_len': 32, 'seed': 7," in err
    with TokenFileWriter(files / "other", vocab_size=80) as writer:
        for start in range(40):
            writer.add([1 + (start + 11 * i) % 79 for i in range(50 + start)] + [0])
    _, err = train("unbroken", *more, "--data_file", str(files / "other"), code=2)
    assert "has data {'content': " in err and "give the first run's flags and data" in err
    shutil.copytree(unbroken, files / "damaged")
    optimizer = next((files / "damaged" / "checkpoints" / "step-00000060").rglob("rank-*"))
    optimizer.write_bytes(optimizer.read_bytes()[:1000])
    _, err = train("damaged", *more, code=2)
    assert f"{optimizer.name} is missing or not of the" in err and "--fresh_optimizer" in err and "Traceback" not in err


def manifest_of(run):
    return json.loads((find_checkpoint(run) / "state.json").read_text())


def test_a_run_goes_on_by_the_products_that_it_began_with(files, train, accelerator):
    if accelerator == "gpu":
        pytest.skip("its products are not the processor's")
    out, _ = train("elsewhere", "--precision", "fp32", "--epoch_count", "1")
    here = products.row()
    assert f"products: {here} ({here.known})" in out
    state = manifest_of(files / "elsewhere")
    assert state["products"] == here.recorded() and state.pop("crc32")
    there = products.ProductRow(False, not here.onednn)
    write_state(find_checkpoint(files / "elsewhere") / "state.json", {**state, "products": there.recorded()})
    out, _ = train("elsewhere", "--precision", "fp32", "--resume")
    assert f"it goes on with {there}, and bits may differ" in out and f"products: {there}" in out
    assert manifest_of(files / "elsewhere")["products"] == there.recorded()


def test_ranks_of_unlike_processors_compute_alike(files, command, accelerator):
    if accelerator == "gpu":
        pytest.skip("their products are not the processor's")
    argv = command("unlike", "--precision", "fp32", "--devices", "2", "--epoch_count", "1")
    ranks = start_ranks(argv, {1: {"ONEDNN_MAX_CPU_ISA": "AVX2"}})
    (out, _), _ = [finish(rank) for rank in ranks]
    unlike = products.row().recorded() != products.CONVERTING.recorded()
    assert (f"all take {products.CONVERTING}" in out) == unlike
    assert manifest_of(files / "unlike")["products"] == products.CONVERTING.recorded()


def test_another_number_of_devices_goes_on_at_the_next_sample(files, train):
    """In the order of rows that share batches, although each is alone in its batch now."""
    name, flags = "moved", ("--precision", "fp32", "--dataload", "pad")
    train(name, *flags, "--micro_bsz", "3", "--epoch_count", "1")
    train(name, *flags, "--micro_bsz", "1", "--devices", "2", "--resume", "--fresh_optimizer")
    lines = metrics(files, name)
    assert [line["samples"] for line in lines] == [3, 6, 9, 12, 14, 16]
    assert [line["step"] for line in lines] == [0, 2, 3, 5, 6, 7]  # as those of a step that takes 2
    state = json.loads((files / name / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["samples_seen"] == 16
    assert lines[4]["loss"] < lines[0]["loss"]


def test_larger_steps_forget_nothing_of_those_before(files, train):
    """Neither the metrics of smaller steps, though they have more lines, nor the best adapter and its loss."""
    flags = ("--precision", "fp32", "--val_data", str(files / "data"), "--val_every", "2", "--micro_bsz")
    train("larger", *flags, "1", "--epoch_count", "2")
    before, best = metrics(files, "larger"), (files / "larger" / "adapter-best.safetensors").read_bytes()
    worse = ("--lr_init", "1", "--lr_final", "1", "--epoch_count", "1", "--warmup_steps", "0")
    out, _ = train("larger", *flags, "4", *worse, "--resume", "--fresh_optimizer")  # at its third of 4 steps
    lines = metrics(files, "larger")
    assert [line["step"] for line in lines] == [0, 0, 0, 0, 0, 0, 0, 1, 2, 3]
    assert [line | {"step": None} for line in lines[:8]] == [line | {"step": None} for line in before]
    lowest = min(line["val_loss"] for line in before if "val_loss" in line)
    assert lines[-1]["val_loss"] > lowest and f"best loss {lowest:.4f}" in out
    assert (files / "larger" / "adapter-best.safetensors").read_bytes() == best


def test_the_lowest_loss_is_that_on_the_data_of_now(files, train):
    """With other validation data, earlier losses do not count, nor does the patience that they have used up."""
    with TokenFileWriter(files / "held-out", vocab_size=80) as writer:
        writer.add([79 - i % 79 for i in range(60)])
    rates = ("--lr_init", "0", "--lr_final", "0", "--warmup_steps", "0", "--precision", "fp32")
    flags = ("--val_every", "1", "--early_stop", "2", *rates, "--val_data")
    train("validated", *flags, str(files / "data"))
    out, _ = train("validated", *flags, str(files / "held-out"), "--resume")
    lines = metrics(files, "validated")
    best = files / "validated" / "adapter-best.safetensors"
    assert best.exists() and len(lines) == 6
    assert f"best loss {lines[3]['val_loss']:.4f}, {best}; stopped after 2 validations" in out
    again = ("--early_stop", "4", "--epoch_count", "3", "--resume")  # which knows of both data sets
    out, _ = train("validated", *flags, str(files / "held-out"), *again)
    assert lines[0]["val_loss"] < lines[3]["val_loss"] and len(metrics(files, "validated")) == 8
    assert f"best loss {lines[3]['val_loss']:.4f}, {best}; stopped after 4 validations" in out


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
    found = SavedOptimizer(find_checkpoint(folder)).pieces
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
    notes = match_world(args, World(1, ranks), saved_state(args.proj_dir, args.resume))
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


def test_a_run_keeps_its_order_of_rows_whatever_its_batches(tmp_path):
    alone = DataConfig(micro_bsz=1)
    save_state(tmp_path, {"data": {"rows_share_batches": True}})
    assert with_kept_order(alone, saved_state(str(tmp_path), "must")).buckets
    assert with_kept_order(alone, saved_state(str(tmp_path), "")) == alone and not alone.buckets
