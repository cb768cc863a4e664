"""A run says at its end whether what it learned holds for held-out rows, and which file is best."""

from pathlib import Path

import pytest

from rwkv_peft.checkpoints.best import HeldOut
from rwkv_peft.training.measuring.held_out import blind, doubt, told
from rwkv_peft.training.step.plan import Plan

PLAN, BEST = Plan(8, 10, 40, 0, 0), Path("out/adapter-best.safetensors")


def held_out(start, *losses, since=0):
    """The HeldOut of a run that validates every ten steps of 8 samples."""
    records = [{"step": 0, "samples": 8, "val_start": start}]
    records += [{"step": 10 * n - 1, "samples": 80 * n, "val_loss": loss} for n, loss in enumerate(losses, 1)]
    return HeldOut.of(records, since)


@pytest.mark.parametrize(
    "losses, words",
    [
        ((3.0, 1.0, 0.5, 0.3, 0.2), ""),
        ((3.0, 1.0, 0.5, 0.6, 0.62), ""),  # less than a twentieth of what it had gained
        ((3.0, 1.0, 0.5, 0.6, 0.7), "after step 20 the run learned its own rows by heart"),
        ((3.0, 1.0, 0.5, 0.6, 0.7), f"take {BEST} of this folder. What ends sooner: --epoch_count 2, or --early_"),
        ((3.0, 3.0, 3.1, 3.2, 4.0), "known better before training (3.0000, and 3.0000 at best): this run learned"),
        ((0.02, 0.021, 0.03), "(0.0200, and 0.0210 at best): the base has learned such rows already"),
        ((3.0, 3.2, 3.1, 3.2, 4.0), "or the rate too high: try --lr_init 0.0002"),
        ((0.9, 0.1, 0.0001, 0.0001, 0.0001), ""),
    ],
)
def test_rows_learned_by_heart_are_told_from_what_holds_for_others(losses, words):
    note = doubt(held_out(*losses), PLAN, BEST, 6e-4)
    assert words in note and bool(note) == bool(words)


def test_the_loss_before_and_after_and_the_lowest_are_told():
    words = told(held_out(3.0, 1.0, 0.5, 0.7), "loss", 1)
    assert words == "loss 3.0000 before training, 0.7000 at the end; after step 20 the lowest loss 0.5000"
    words = told(held_out(0.0, -0.1, -0.7), "reward", -1)
    assert words == "reward 0.0000 before training, 0.7000 at the end; after step 20 the highest reward 0.7000"


@pytest.mark.parametrize(
    "gains, is_blind",
    [([1.0, 0.5, 2.0, 0.1, 0.8, 1.2, 0.4, 0.9], False), ([0.5, -0.5, 0.2, -0.1] * 2, True), ([0.0] * 7, False)],
)
def test_answers_that_do_not_depend_on_their_questions_are_told(gains, is_blind):
    note = blind([(1.0, 1.0 + gain) for gain in gains])
    assert bool(note) == is_blind and ("learned how answers look, and not what they say" in note) == is_blind


def test_losses_on_other_rows_do_not_count():
    found = held_out(3.0, 1.0, 0.5, 0.9, 0.8, since=160)
    assert found.start is None and found.losses == [(30, 0.9), (40, 0.8)] and doubt(found, PLAN, BEST, 6e-4) == ""
    assert told(found, "loss", 1) == "loss 0.8000 at the end; after step 40 the lowest loss 0.8000"
