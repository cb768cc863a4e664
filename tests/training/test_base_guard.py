"""A base that is overwritten while a run reads it ends the run with a message, before foreign weights are saved."""

import shutil
import signal

import pytest
import torch

from training.runs import finish, metrics, start, wait_for_steps


def begun(files, command, tiny_state, name, *more):
    """(a run that has taken some steps and goes on, its base)."""
    base = files / f"{name}.pth"
    torch.save(tiny_state(dtype=torch.bfloat16), base)
    flags = ("--load_model", str(base), "--epoch_steps", "100000", "--save_every", "5", *more)
    process = start(command(name, *flags))
    wait_for_steps(files, name, 8, process)
    return process, base


def test_a_base_that_becomes_shorter_is_told_and_not_by_a_signal_alone(files, command, tiny_state):
    process, base = begun(files, command, tiny_state, "shortened")
    base.write_bytes(b"")
    _, err = process.communicate(timeout=600)
    assert process.returncode in (1, 2), err  # as a page was read before the step was judged, or not
    assert f"{base} was overwritten while it is read: it has 0 bytes, and had " in err and "Traceback" not in err
    assert "step-" in err and "--resume" in err


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_foreign_weights_of_the_same_size_are_told_where_they_are_read(files, command, tiny_state, precision):
    """A run in another dtype than the file's has read the whole file by then, and goes on."""
    name = f"foreign-{precision}"
    process, base = begun(files, command, tiny_state, name, "--precision", precision)
    other = files / "other" / base.name  # which stands in the file, too
    other.parent.mkdir(exist_ok=True)
    torch.save(tiny_state(dtype=torch.bfloat16, seed=1), other)
    content = other.read_bytes()
    assert len(content) == base.stat().st_size
    with open(base, "r+b") as file:
        file.write(content)
    if precision == "fp32":
        steps = len(metrics(files, name))
        wait_for_steps(files, name, steps + 5, process)
        process.send_signal(signal.SIGTERM)
        finish(process, 143)
        return
    _, err = finish(process, 2)
    assert f"{base} was overwritten while it is read: it holds other weights; put the old file back" in err
    last = max((files / name / "checkpoints").glob("step-*"))
    assert int(last.name[5:]) <= len(metrics(files, name))


def test_a_base_that_is_touched_or_replaced_does_not_end_a_run(files, command, tiny_state):
    process, base = begun(files, command, tiny_state, "touched")
    base.touch()
    steps = len(metrics(files, "touched"))
    wait_for_steps(files, "touched", steps + 5, process)
    shutil.copy(base, files / "copy.pth")
    (files / "copy.pth").write_bytes(b"another")
    (files / "copy.pth").rename(base)
    wait_for_steps(files, "touched", steps + 10, process)
    process.send_signal(signal.SIGTERM)
    finish(process, 143)


def test_a_base_that_is_overwritten_in_part_is_named_as_the_cause_of_what_is_not_finite(files, command, tiny_state):
    """No value that a fingerprint reads changes, so that nothing else notices."""
    process, base = begun(files, command, tiny_state, "partly")
    key = "blocks.1.ffn.key.weight"
    values = tiny_state(dtype=torch.bfloat16)[key].flatten()[100:1900].view(torch.uint8).numpy().tobytes()
    place = base.read_bytes().index(values)
    with open(base, "r+b") as file:
        file.seek(place)
        file.write(b"\xff" * len(values))
    _, err = finish(process, 1)
    assert f"{base} is not finite: {key} holds NaN or Inf" in err and "--lr_init" not in err and "Traceback" not in err
