"""A run's checkpoints: whole after a kill or on a full disk, compared with the run that goes on, and read by any ranks
and stages; damage is reported with the older checkpoint as the remedy."""

import errno
import itertools
import json
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch

from rwkv_peft.checkpoints.tensors import read_safetensors, save_safetensors
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import AdapterConfig
from rwkv_peft.training.run import main
from rwkv_peft.training.saving.checkpoints import (
    discard_old,
    find_checkpoint,
    list_checkpoints,
    record_of,
    require_files,
    telling_refusals,
    write_state,
)
from rwkv_peft.training.saving.optimizer_state import KINDS, METADATA_KEY, Fragment, SavedOptimizer, write_pieces
from rwkv_peft.training.saving.resume import Lowest, forget_rest, history, read_run_state
from rwkv_peft.training.step.plan import Plan
from training.runs import finish, start


def test_larger_steps_count_from_their_own_checkpoint(tmp_path):
    for step, seen in ((12, 12), (4, 16)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        write_state(folder / "state.json", {"samples_seen": seen})
    assert find_checkpoint(tmp_path).name == "step-00000004"


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"samples_seen": 1}'])
def test_a_damaged_state_is_named(tmp_path, text):
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read: .* delete"):
        read_run_state(find_checkpoint(tmp_path), {})


def test_a_line_of_metrics_that_was_cut_off_does_not_hinder_resuming(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [
        json.dumps({"step": step, "loss": 0.1, "val_loss": 3.5 - step, "samples": 4 * step + 4}) + "\n"
        for step in range(3)
    ]
    path.write_text("".join(whole) + '{"step": 3, "lo')
    plan = Plan(step_samples=4, epoch_steps=9, total_steps=9, first_step=2, first_sample=8)
    assert Lowest(history(path, plan)).loss == 2.5
    forget_rest(path, plan)
    assert path.read_text() == "".join(whole[:2])


DATA = {"ctx_len": 16, "counted": "def"}
RUN = {"base": "abc", "precision": "bf16", "optim": "adamw", "objective": "dpo", "teacher": "", "files": {}}
RUN |= {"samples_seen": 1, "trained": [], "validated_from": 0, "validation": ""}


@pytest.mark.parametrize(
    "saved, now, init, words",
    [
        ({}, {}, "", ""),
        ({}, {"sft_think": ""}, "", ""),
        ({}, {"sft_think": "on"}, "", "has data {'sft_think': ''}, this command {'sft_think': 'on'}"),
        *(({"think_labels": old}, {"think_labels": new}, "", "") for old, new in ((False, ()), (True, (128, 1024)))),
        ({"val_seed": 5}, {}, "", "has data {'val_seed': 5}, this command {'val_seed': None}"),
        ({}, {"val_seed": 5}, "", "has data {'val_seed': None}, this command {'val_seed': 5}"),
        ({}, {}, "init_pissa.pth", "has adapter {'init': ''}, .* {'init': 'init_pissa.pth'}; give the"),
    ],
)
def test_a_setting_that_a_checkpoint_lacks_has_its_default(tmp_path, saved, now, init, words):
    known = {name: value for name, value in asdict(AdapterConfig(rank=16)).items() if name != "init"}
    known["entries"] = 64  # a setting of a method that left
    write_state(tmp_path / "state.json", RUN | {"adapter": known, "data": DATA | saved})
    command = RUN | {"adapter": asdict(AdapterConfig(rank=16, init=init)), "data": DATA | now}
    with pytest.raises(UserError, match="^--resume: .* is of 0.2.0 or before, .* add --fresh_optimizer"):
        read_run_state(tmp_path, command)
    (tmp_path / "optimizer").mkdir()
    with pytest.raises(UserError, match=words) if words else nullcontext():
        assert read_run_state(tmp_path, command)["base"] == "abc"


NAMES = ("adapter.safetensors", "optimizer/rank-00000.safetensors")


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "optimizer").mkdir()
    for name in NAMES:
        (tmp_path / name).write_bytes(bytes(range(256)) * 8)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "change, what",
    [
        (lambda content: content[:-1], "not of the 2,048 bytes"),
        (lambda content: bytes(2048), "differs from the file that was saved: its checksum"),
        (lambda content: content[::-1], "differs from the file that was saved: its checksum"),
        (lambda content: content[:700] + bytes([content[700] ^ 16]) + content[701:], "differs from the file"),
    ],
    ids=["truncated", "zeros", "foreign", "flipped"],
)
def test_damage_is_told_with_the_older_checkpoint_as_the_remedy(checkpoint, name, change, what):
    records = {name: record_of(checkpoint / name) for name in NAMES}
    require_files(checkpoint, records, fresh_optimizer=False, contents=True)
    (checkpoint / name).write_bytes(change((checkpoint / name).read_bytes()))
    with pytest.raises(UserError, match=f"{name} .*{what}.*delete {checkpoint} to resume from an older") as error:
        require_files(checkpoint, records, fresh_optimizer=False, contents=True)
    assert ("--fresh_optimizer" in str(error.value)) == ("/" in name)
    if "/" in name:
        require_files(checkpoint, records, fresh_optimizer=True, contents=True)


SIZES = {"blocks.0.att.key.bone": 37, "blocks.0.ln1.weight": 5, "emb.weight": 64, "one": 1}


def whole():
    """The whole state of a model of SIZES: {(kind, name): float32 (size,)}."""
    generator = torch.Generator().manual_seed(0)
    return {(kind, name): torch.randn(size, generator=generator) for name, size in SIZES.items() for kind in KINDS}


def ranges(stage, rank, ranks):
    """{name: (start, end)} of a rank as ZeRO cuts: all parameters together, or in stage 3 each."""
    if stage == 3:
        lengths = {name: -(-size // ranks) for name, size in SIZES.items()}
        return {name: (rank * n, min((rank + 1) * n, SIZES[name])) for name, n in lengths.items()}
    share, place, found = -(-sum(SIZES.values()) // ranks), 0, {}
    for name, size in SIZES.items():
        found[name] = max(rank * share - place, 0), min((rank + 1) * share - place, size)
        place += size
    return found


def pieces(stage, rank, ranks, state):
    return [
        Fragment(name, SIZES[name], start, {kind: state[kind, name][start:end] for kind in KINDS})
        for name, (start, end) in ranges(stage, rank, ranks).items()
        if start < end
    ]


def written(folder, stage, ranks):
    folder.mkdir()
    for rank in range(ranks):
        write_pieces(folder, rank, pieces(stage, rank, ranks, whole()), steps=7)
    return folder


@pytest.mark.parametrize("stage, ranks", [(1, 1), (1, 2), (2, 4), (3, 1), (3, 2), (3, 4), (1, 64)])
def test_any_ranks_and_stage_read_what_others_wrote(tmp_path, stage, ranks):
    saved = SavedOptimizer(written(tmp_path / "checkpoint", stage, ranks))
    assert saved.steps == 7
    for other, count in ((1, 1), (2, 3), (3, 1), (3, 5)):
        found = {place: torch.full_like(tensor, torch.nan) for place, tensor in whole().items()}
        for rank in range(count):
            for piece in pieces(other, rank, count, found):
                saved.fill(piece)
        assert all(torch.equal(tensor, found[place]) for place, tensor in whole().items())


def lacking(tensors, told):
    del tensors[next(key for key in tensors if key.startswith("exp_avg:0:emb"))]


def cut(tensors, told):
    tensors["master:0:emb.weight"] = tensors["master:0:emb.weight"][:-1].clone()


def torn(tensors, told):
    tensors["exp_avg:9:emb.weight"] = tensors.pop("exp_avg:0:emb.weight")[9:].clone()


EDITS = [
    (lacking, "exp_avg of emb.weight lacks element 0"),
    (cut, "master of emb.weight lacks element 63"),
    (torn, "exp_avg of emb.weight lacks element 0"),
    (lambda tensors, told: tensors.update(x=torch.zeros(1)), "not enough values to unpack"),
    (lambda tensors, told: told.pop("steps"), "steps"),
    (lambda tensors, told: told.update(format_version=2), "its format is 2, and 1 is read here"),
]


@pytest.mark.parametrize("edit, words", EDITS, ids=["lacking", "cut", "torn", "odd", "uncounted", "later"])
def test_what_is_missing_or_changed_is_told(tmp_path, edit, words):
    path = written(tmp_path / "checkpoint", 1, 1) / "optimizer" / "rank-00000.safetensors"
    tensors, header = read_safetensors(path)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    told = json.loads(header[METADATA_KEY])
    edit(tensors, told)
    save_safetensors(path, tensors, {METADATA_KEY: json.dumps(told)})
    with pytest.raises(UserError, match=f"does not hold the optimizer's state of this run: .*{words}.*--fresh_"):
        saved = SavedOptimizer(tmp_path / "checkpoint")
        for piece in pieces(1, 0, 1, whole()):
            saved.fill(piece)


def test_a_folder_may_be_named_like_a_pattern(files, train):
    """As a pattern, the name would match other folders, and not this one."""
    train("named [ab]*?b[", "--epoch_count", "1")
    out, _ = train("named [ab]*?b[", "--resume")
    assert "resuming after step 4" in out


FILES = ("adapter.safetensors", "state.json", "optimizer/rank-00000.safetensors")
CHANGES = ("os.rename", "os.remove", "os.rmdir")
BY_EPOCH = [f"{kind}-epoch-{epoch}.{end}" for kind, end in (("adapter", "safetensors"), ("merged", "pth"))
            for epoch in (2, 9, 10)]  # fmt: skip
OTHERS = ["adapter.safetensors", "adapter-best.safetensors", "state.pth", "my-adapter-epoch-1.safetensors"]


def a_run(folder, steps=(2, 9, 10)):
    """A folder as a run leaves it, with checkpoints after so many steps of one sample."""
    for step in steps:
        for name in FILES:
            file = folder / "checkpoints" / f"step-{step:08d}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            write_state(file, {"samples_seen": step})
    for name in (*BY_EPOCH, *OTHERS):
        (folder / name).touch()
    return folder


def found(folder):
    """(the steps of a folder's checkpoints, the names of its other files)."""
    steps = [int(path.name[5:]) for path in list_checkpoints(folder)]
    return steps, {path.name for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("keep, steps, epochs", [
    (None, [9, 10], {2, 9, 10}), (0, [2, 9, 10], {2, 9, 10}), (1, [10], {10}), (2, [9, 10], {9, 10}),
    (5, [2, 9, 10], {2, 9, 10}),
])  # fmt: skip
def test_the_newest_stay(tmp_path, keep, steps, epochs):
    folder = a_run(tmp_path)
    discard_old(folder, keep)
    kept = {name for name in BY_EPOCH if int(name.split("-")[2].split(".")[0]) in epochs}
    assert found(folder) == (steps, kept | set(OTHERS))


@pytest.mark.parametrize("number, kind", [(errno.ENOSPC, UserError), (errno.EACCES, UserError),
                                          (errno.ECONNRESET, OSError)])  # fmt: skip
def test_a_disk_that_refuses_is_told_with_what_is_left(tmp_path, number, kind):
    words = f"{os.strerror(number)}.*the last checkpoint is .*step-00000010" if kind is UserError else "reset"
    with pytest.raises(kind, match=f"(?i){words}"), telling_refusals(a_run(tmp_path)):
        raise OSError(number, os.strerror(number))


def killed(folder, operation):
    """Let a process that keeps only one save kill itself before its `operation`-th change -> True if it got so far."""
    process = os.fork()
    if process == 0:
        count = itertools.count(1)

        def look(event, arguments):
            if event in CHANGES and next(count) == operation:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(look)
        discard_old(folder, 1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def test_a_kill_at_any_file_leaves_whole_checkpoints_and_the_next_save_the_rest(tmp_path):
    for operation in itertools.count(1):
        folder = a_run(tmp_path / str(operation))
        if not killed(folder, operation):
            break
        for checkpoint in list_checkpoints(folder):
            assert all((checkpoint / name).exists() for name in FILES)
        steps, files = found(folder)
        assert steps[-1] == 10 and "adapter-epoch-10.safetensors" in files
        discard_old(folder, 1)
        assert found(folder) == ([10], {"adapter-epoch-10.safetensors", "merged-epoch-10.pth", *OTHERS})
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000010"]
    assert operation > 2 * (2 + len(FILES))  # of two checkpoints: the name, each file, the two folders


FULL = """
import errno
from rwkv_peft.cli.commands import run
from rwkv_peft.training.run import main
from rwkv_peft.training.saving import saver

def full(path, state):
    if state["step"] >= {step}:
        path.write_text("half of it")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    whole(path, state)

whole, saver.write_state = saver.write_state, full
run("train")
"""


@pytest.mark.parametrize("step", [4, 8])
def test_a_disk_that_is_full_at_the_last_file_of_a_save_leaves_what_was_promised(files, command, step):
    name, script = f"full-at-{step}", files / f"full-at-{step}.py"
    script.write_text(FULL.format(step=step))
    argv = command(name)
    _, err = finish(start([argv[0], str(script), *argv[2:]]), 2)
    run = files / name
    assert f"the disk is full; free some space or choose another disk; the trained tensors are in {run}" in err
    assert "nothing was changed" not in err and err.count("\n") == 1
    last = f"the last checkpoint is {run}/checkpoints/step-00000004"
    assert ("no checkpoint had been saved yet" if step == 4 else last) in err
    assert not list(run.rglob(".*"))
    trained = (run / "adapter.safetensors").read_bytes()
    if step == 4:
        _, err = finish(start([*argv, "--resume", "auto"]), 2)
        assert "already holds adapter" in err and "which a new run would overwrite" in err
    assert (run / "adapter.safetensors").read_bytes() == trained


def test_a_disk_without_room_for_a_save_is_told_before_the_first_step(files, command, monkeypatch):
    monkeypatch.setattr("rwkv_peft.checkpoints.atomic.room_at", lambda path: 1000)
    with pytest.raises(UserError, match=r"--proj_dir \S+ needs [\d,]+ bytes for a save, and its disk has 1,000 free"):
        main(command("no-room")[2:])
    assert not (files / "no-room").exists()
