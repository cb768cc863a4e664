"""How many tokens of prompts are read between two steps of the answers."""

from types import SimpleNamespace

import pytest

from rwkv_peft.inference import pace
from rwkv_peft.inference.pace import CROWD, LEAST, MOST, Pace


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def read(pace, clock, tokens, seconds):
    pace.begin(tokens)
    clock.now += seconds
    pace.end()


@pytest.mark.parametrize("rate", [400.0, 8000.0])
def test_a_piece_takes_about_the_seconds_that_are_given(clock, rate):
    pace = Pace(64, 0.1)
    for _ in range(20):
        tokens = pace.piece(1, 0)
        read(pace, clock, tokens, tokens / rate)
    assert pace.piece(1, 0) == pytest.approx(0.1 * rate, rel=0.1)


def test_a_piece_takes_as_long_as_a_step_of_the_answers(clock):
    pace = Pace(64, 0.1)
    read(pace, clock, 64, 0.1)
    for own, tokens in ((0.5, 320), (0.02, 64), (60.0, MOST)):
        clock.now += own
        assert pace.piece(10, 20) == pytest.approx(tokens, abs=1)
        pace.end()


def test_short_prompts_on_a_slow_machine_do_not_slow_what_is_read_at_once(clock):
    pace = Pace(64, 0.1)
    for _ in range(20):
        read(pace, clock, LEAST // 2, 1.0)
    assert pace.piece(63, 1) == 64 * CROWD and pace.piece(40, 20) == 128
