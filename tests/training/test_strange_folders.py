"""A run's folder with missing or wrong entries: --resume says so before anything is trained."""

import json
import shutil

import pytest

from rwkv_peft.checkpoints.tensors import read_safetensors, save_safetensors
from rwkv_peft.training.saving.checkpoints import record_of, write_state


@pytest.fixture(scope="module")
def begun(files, train):
    """The folder of a run with one checkpoint to resume from."""
    train("begun", "--epoch_count", "1")
    return files / "begun"


def edited(run, name, change):
    """A copy of a run, with `change` applied to the tensors in the file of its optimizer's state, and the record
    updated."""
    folder = run.with_name(name)
    shutil.copytree(run, folder)
    checkpoint = next(folder.glob("checkpoints/step-*"))
    file = next(checkpoint.glob("optimizer/*"))
    tensors, header = read_safetensors(file)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors)
    save_safetensors(file, tensors, header)
    state = json.loads((checkpoint / "state.json").read_text())
    del state["crc32"]
    state["files"][str(file.relative_to(checkpoint))] = record_of(file)
    write_state(checkpoint / "state.json", state)


def test_what_does_not_hold_the_runs_state_is_told_before_anything_is_trained(files, train, begun):
    edited(begun, "lacking", lambda tensors: tensors.pop("exp_avg:0:blocks.1.att.output.bone"))
    before = (files / "lacking" / "metrics.jsonl").read_bytes()
    _, err = train("lacking", "--resume", code=2)
    told = (
        "optimizer does not hold the optimizer's state of this run: exp_avg of blocks.1.att.output.bone lacks element 0"
    )
    assert err.count("\n") == 1 and told in err and "--fresh_optimizer" in err, err
    assert (files / "lacking" / "metrics.jsonl").read_bytes() == before


def test_what_is_there_besides_is_not_loaded(files, train, begun):
    """A frozen weight among the trained ones would replace the base's."""
    edited(
        begun,
        "more",
        lambda tensors: tensors.update({"master:0:head.weight": tensors["master:0:blocks.0.att.key.bone"]}),
    )
    shutil.copytree(begun, files / "same")
    for name in ("more", "same"):
        train(name, "--resume")
    whole, other = ((files / name / "adapter.safetensors").read_bytes() for name in ("same", "more"))
    assert whole == other


def test_a_place_in_the_data_that_was_edited_is_refused(files, train, begun):
    shutil.copytree(begun, files / "placed")
    path = next(files.glob("placed/checkpoints/step-*/state.json"))
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"samples_seen": 2}))
    _, err = train("placed", "--resume", code=2)
    assert "state.json cannot be read: it was changed after it was written: its checksum differs" in err


def test_a_folder_may_be_named_like_a_pattern(files, train):
    """As a pattern, the name would match other folders, and not this one."""
    train("named [ab]*?b[", "--epoch_count", "1")
    out, _ = train("named [ab]*?b[", "--resume")
    assert "resuming after step 4" in out
