"""Ctrl-C at the start of a run, in a new interpreter, and at its end."""

import signal
import time
from types import SimpleNamespace

from rwkv_peft.training.ending import exit_code
from rwkv_peft.training.loop import StopRequest
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


def test_a_signal_in_the_step_that_ends_a_run_changes_nothing():
    """Its last, or one after which --early_stop ends it."""
    plan = SimpleNamespace(total_steps=10)
    for done, number, exhausted, code in (
        (3, signal.SIGINT, False, 130),
        (3, 0, False, 143),  # another rank has the signal
        (3, signal.SIGINT, True, 0),
        (10, signal.SIGTERM, False, 0),
    ):
        assert exit_code(SimpleNamespace(exhausted=exhausted, plan=plan, bound=None), done, StopRequest(number)) == code
