"""A run's folder with missing or wrong entries: --resume says so before anything is trained."""

import json
import re
import shutil

import pytest
import torch
from deepspeed.utils.tensor_fragment import fragment_address

from rwkv_peft.training.saving.run_state import write_state
from rwkv_peft.training.saving.saved_files import record_of


@pytest.fixture(scope="module")
def begun(files, train):
    """{ZeRO stage: the folder of a run with one checkpoint to resume from}."""
    for stage in (1, 3):
        train(f"begun-{stage}", *flags(stage), "--epoch_count", "1")
    return {stage: files / f"begun-{stage}" for stage in (1, 3)}


def flags(stage):
    return ("--strategy", f"deepspeed_stage_{stage}")


def edited(run, name, pattern, change):
    """A copy of a run, with `change` applied to the object in one of DeepSpeed's files, and the record updated."""
    folder = run.with_name(name)
    shutil.copytree(run, folder)
    checkpoint = next(folder.glob("checkpoints/step-*"))
    file = next(checkpoint.glob(f"zero/{pattern}"))
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)
    state = json.loads((checkpoint / "state.json").read_text())
    del state["crc32"]
    state["files"][str(file.relative_to(checkpoint))] = record_of(file)
    write_state(checkpoint / "state.json", state)
    return file


def optimizer(content):
    return content["optimizer_state_dict"]


EDITS = {
    "no paddings": (1, "*optim*", lambda c: optimizer(c).pop("param_alignment_paddings"), "paddings is missing"),
    "no groups": (
        1,
        "*optim*",
        lambda c: optimizer(c)["base_optimizer_state"].pop("param_groups"),
        "optimizer_state_dict.base_optimizer_state.param_groups is missing",
    ),
    "a moment of another shape": (
        1,
        "*optim*",
        lambda c: optimizer(c)["base_optimizer_state"]["state"][0].update(exp_avg=torch.zeros(3)),
        "state.0.exp_avg is torch.float32 .3,., and torch.float32 ",
    ),
    "other slices": (
        1,
        "*optim*",
        lambda c: (
            optimizer(c)["param_slice_mappings"][0].update(dict.fromkeys(["x"], fragment_address(1, 2)))
            or optimizer(c)["param_slice_mappings"][0].popitem(last=False)
        ),
        "param_slice_mappings.0.*is missing",
    ),
    "an adapter that is a dict": (
        1,
        "*model*",
        lambda c: c["module"].update(dict.fromkeys(list(c["module"])[:1], {})),
        "module.*bone is a dict, and a tensor is due",
    ),
    "no numbers of steps": (3, "*model*", lambda c: c.update(global_steps="4"), "global_steps is no number of steps"),
    "flat groups of another dtype": (
        3,
        "*optim*",
        lambda c: optimizer(c)["fp32_flat_groups"].__setitem__(0, torch.zeros(1)),
        "fp32_flat_groups.0. is torch.float32 .1,.",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_does_not_hold_the_runs_state_is_told_by_its_place(files, train, begun, edit):
    stage, pattern, change, words = EDITS[edit]
    name = edit.replace(" ", "-")
    file = edited(begun[stage], name, pattern, change)
    before = (files / name / "metrics.jsonl").read_bytes()
    _, err = train(name, *flags(stage), "--resume", code=2)
    told = f"{file.name} does not hold the state of this run: .*{words}.*--fresh_optimizer"
    assert err.count("\n") == 1 and re.search(told, err), err
    assert (files / name / "metrics.jsonl").read_bytes() == before


def test_what_is_there_besides_is_not_loaded(files, train, begun):
    """A frozen weight among the trained ones would replace the base's."""

    def add(content):
        content["module"]["head.weight"] = torch.zeros(80, 64, dtype=torch.bfloat16)
        content["frozen_param_fragments"] = {"x": 1}

    edited(begun[1], "more", "*model*", add)
    shutil.copytree(begun[1], files / "same")
    for name in ("more", "same"):
        train(name, *flags(1), "--resume")
    whole, other = ((files / name / "adapter.safetensors").read_bytes() for name in ("same", "more"))
    assert whole == other


def test_a_place_in_the_data_that_was_edited_is_refused(files, train, begun):
    shutil.copytree(begun[1], files / "placed")
    path = next(files.glob("placed/checkpoints/step-*/state.json"))
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"samples_seen": 2}))
    _, err = train("placed", *flags(1), "--resume", code=2)
    assert "state.json cannot be read (it was changed after it was written: its checksum differs)" in err
    del state["crc32"]  # as earlier versions wrote it
    path.write_text(json.dumps(state))
    train("placed", *flags(1), "--resume")


@pytest.mark.parametrize("pattern", ["[ab]", "a*?b["])
def test_a_folder_may_be_named_like_a_pattern(files, train, pattern):
    """As a pattern, each name would match another run's folder, or none."""
    train(f"named {pattern}", "--epoch_count", "1")
    out, _ = train(f"named {pattern}", "--resume")
    assert "resuming after step 4" in out
