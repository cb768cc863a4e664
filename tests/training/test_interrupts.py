"""Ctrl-C at the start of a run, in a new interpreter, and at its end."""

import signal
import time
from types import SimpleNamespace

import pytest

from rwkv_peft.cli.names import METRICS
from rwkv_peft.training.engine import fit
from training.runs import start, wait_for_words


def test_ctrl_c_before_the_first_step_is_one_line(command):
    process = start(command("early", "--epoch_steps", "100000"), cold=True)
    wait_for_words("output ", process)
    time.sleep(0.8)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130
    if "stopping after this step" not in out:  # else this machine had begun to train, and Ctrl-C saves
        assert err in ("interrupted\n", "interrupted; what was saved before is intact\n")


def test_ctrl_c_after_the_last_word_of_a_run_changes_nothing(command):
    process = start(command("late", "--epoch_steps", "1", "--epoch_count", "1"))
    wait_for_words("finished ", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize("exhausted, code, words", [(False, 130, "--resume goes on"), (True, 0, "after 2 validations")])
def test_ctrl_c_in_the_step_that_ends_a_run_early_changes_nothing(tmp_path, monkeypatch, exhausted, code, words):
    monkeypatch.setattr(fit, "plot_loss", print)
    monkeypatch.setattr(fit, "notes_on", lambda *_: ())
    (tmp_path / METRICS).write_text('{"step": 3, "samples": 8, "loss": 1.0, "val_loss": 1.5}\n')
    run = SimpleNamespace(
        folder=tmp_path,
        plan=SimpleNamespace(total_steps=9),
        config=SimpleNamespace(
            train=SimpleNamespace(early_stop=2, lr_init=1e-3), objective=SimpleNamespace(needs=(), unit="token")
        ),
        inputs=SimpleNamespace(identity={"validated_from": 0}),
        rows=None,
        rewards=None,
        validator=SimpleNamespace(swapped=()),
        exhausted=exhausted,
        saver=SimpleNamespace(newest=tmp_path / "adapter.safetensors"),
    )
    lit = SimpleNamespace(stopping=True, step=4, stop_requested=signal.SIGINT)
    found, told = fit.ended(run, lit, print)
    assert found == code and words in told
