"""Learning-rate schedules hit their corners exactly, and follow the formulas that --help gives."""

import pytest

from programs import load
from rwkv_peft.config.train import SCHEDULES, learning_rate

RUN = {"total_steps": 100, "lr_init": 1e-3, "lr_final": 1e-5}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_its_formula(schedule):
    ours, formula = load("benchmarks", "schedules").rates(schedule)
    assert ours == pytest.approx(formula, rel=1e-12) and len(set(ours[:20])) == 20


@pytest.mark.parametrize("schedule", ["exp", "rwkv-lm", "rwkv-peft"])
def test_the_corners_of_upstreams_schedules(schedule):
    rate = [learning_rate(step, warmup_steps=10, schedule=schedule, **RUN) for step in range(100)]
    if schedule == "rwkv-peft":  # which warms up nothing, and reaches lr_final a step after the run
        assert (rate[0], rate[50]) == (1e-3, pytest.approx((1e-3 + 1e-5) / 2))
    else:
        assert (rate[0], rate[5]) == (pytest.approx(1e-5), pytest.approx(1e-3 * 0.505))
    if schedule == "exp":
        assert (rate[54], rate[99]) == (pytest.approx(1e-4), pytest.approx(1e-5))  # half-way in the exponent
        assert learning_rate(49, schedule=schedule, total_steps=100, lr_init=1e-3, lr_final=0) == pytest.approx(5e-4)
    if schedule == "rwkv-lm":
        assert (rate[10], rate[55]) == (pytest.approx(1e-3), pytest.approx((1e-3 + 1e-5) / 2))
    assert learning_rate(0, schedule=schedule, **RUN) == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_rises_to_lr_init(schedule):
    rates = [learning_rate(step, warmup_steps=10, schedule=schedule, **RUN) for step in range(11)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert rates == sorted(rates)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_ends_at_lr_final_and_never_rises(schedule):
    rates = [learning_rate(step, warmup_steps=10, schedule=schedule, **RUN) for step in range(10, 100)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-5)
    assert all(a >= b for a, b in zip(rates, rates[1:]))


def test_wsd_is_stable_until_its_last_tenth():
    rates = [learning_rate(step, schedule="wsd", **RUN) for step in range(100)]
    assert set(rates[:91]) == {1e-3}
    assert rates[95] < 1e-3


def test_constant_stays():
    assert {learning_rate(step, schedule="constant", **RUN) for step in range(100)} == {1e-3}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_run(schedule):
    assert learning_rate(0, total_steps=1, lr_init=1e-3, lr_final=1e-5, schedule=schedule) in (1e-3, 1e-5)
