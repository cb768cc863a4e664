"""Learning rates: --lr_init auto by the formulas of docs/guides/learning-rates.md, and schedules by those of --help."""

import json
import math

import pytest

from programs import load
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import TrainConfig
from rwkv_peft.config.train import SCHEDULES, learning_rate
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.rates import ANCHOR, WHOLE, with_first_rates
from training.runs import ROOT

BASE = ROOT / "demo" / "rwkv6-demo.pth"  # of 128 channels
BONE = ANCHOR / 128
RUN = {"total_steps": 100, "lr_init": 1e-3, "lr_final": 1e-5}


def parse(*more):
    return parse_run(["--data_file", str(BASE), "--load_model", str(BASE), "--lr_init", "auto", *more]).config.train


def lora(method, rank, alpha=None):
    settings = {"lora_r": rank} | ({} if alpha is None else {"lora_alpha": alpha})
    return ("--peft", method, "--lora_config", json.dumps(settings))


@pytest.mark.parametrize(
    "flags, rate",
    [
        (("--bone_mode", "bone", "--bone_r", "16"), BONE),
        (("--bone_mode", "bone-signed", "--bone_r", "16"), BONE),
        (("--bone_mode", "bat", "--bone_r", "32"), BONE),
        (("--bone_mode", "bone-mini", "--bone_r", "16", "--bone_mini_r", "16"), BONE),
        (lora("lora", 8), BONE * math.sqrt(3 * 128 / 8)),
        (lora("lora", 8, alpha=16), BONE * math.sqrt(3 * 128 / 8) / 2),
        (lora("rslora", 16, alpha=16), BONE * math.sqrt(3 * 128 / 16) / 4),
        ((*lora("lora-plus", 8), "--loraplus_lr_ratio", "4"), BONE * math.sqrt(3 * 128 / 8) / 4),
        (lora("dora", 8), BONE / math.sqrt(8 / (3 * 128) + 1 / 128)),
        (("--peft", "pissa", "--pissa_config", '{"pissa_r":8}'), BONE / math.sqrt(3 * 8 / 128)),
        (lora("olora", 64), BONE),
        (lora("lora-ga", 8), BONE / math.sqrt(2 * 8 / (16 * math.sqrt(128)))),
        (("--peft", "none"), WHOLE / 128),
        (("--peft", "none", "--train_parts", "ln"), WHOLE / 128),
        (("--peft", "none", "--train_parts", "state"), 0.3),
        (("--data_type", "pairs"), 0.03 * BONE),
        (("--data_type", "prompts", "--reward", "gsm8k"), 0.3 * BONE),
        (("--objective", "distill", "--teacher_model", str(BASE)), BONE),
    ],
)
def test_the_rate_is_the_formulas_to_two_digits(flags, rate):
    train = parse(*flags)
    assert train.lr_init == pytest.approx(rate, rel=0.05) and float(f"{train.lr_init:.2g}") == train.lr_init
    assert train.lr_final == pytest.approx(train.lr_init / 10, rel=0.05)


def test_the_rate_falls_with_the_width_and_meets_both_ends_of_what_is_known():
    """1e-3 was best at 64 channels, and 2e-5 is usual at 4096 channels (RWKV-6 7B), with 2e-4 to 4e-4 for LoRA."""
    assert pytest.approx(1e-3, rel=0.3) == ANCHOR / 64 and pytest.approx(2e-5, rel=0.05) == ANCHOR / 4096
    new = ("--n_layer", "12", "--n_embd", "768", "--vocab_size", "80")
    found = parse_run(["--data_file", "x", "--peft", "none", *new]).config.train
    assert found.lr_init == pytest.approx(6e-4, rel=0.2)  # RWKV-LM's for this size


def test_what_is_given_stays():
    train = parse("--bone_r", "16", "--lr_final", "1e-6")
    assert train.lr_final == 1e-6 and train.lr_chosen == ("lr_init",)
    given = parse("--bone_r", "16", "--lr_init", "1e-4")
    assert (given.lr_init, given.lr_final, given.lr_chosen) == (1e-4, 2e-5, ())


@pytest.mark.parametrize("flags", [("--bone_r", "16"), ("--peft", "none", "--train_parts", "state")])
def test_a_rate_rises_only_if_its_end_is_given(flags):
    train = parse(*flags, "--lr_init", "1e-5")
    assert (train.lr_init, train.lr_final) == (1e-5, 1e-5)
    assert parse(*flags, "--lr_init", "1e-5", "--lr_final", "1e-3").lr_final == 1e-3


def test_a_resumed_run_keeps_the_rates_that_it_began_with():
    state = {"config": {"train": {"lr_init": 0.5, "lr_final": 0.25}}}
    train = parse("--bone_r", "16")
    assert (with_first_rates(train, state).lr_init, with_first_rates(train, state).lr_final) == (0.5, 0.25)
    assert with_first_rates(parse("--bone_r", "16", "--lr_final", "1e-6"), state).lr_final == 1e-6
    assert with_first_rates(TrainConfig(lr_init=0.125), state).lr_init == 0.125
    assert with_first_rates(train, {}) == train


@pytest.mark.parametrize(
    "flags, message",
    [(("--lr_init", "automatic"), "'automatic' is not a number"), (("--lr_init", "-1"), "-1 is negative")],
)
def test_what_is_no_rate_is_told(flags, message):
    with pytest.raises(UserError, match=message):
        parse(*flags)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_its_formula(schedule):
    ours, formula = load("benchmarks", "schedules").rates(schedule)
    assert ours == pytest.approx(formula, rel=1e-12) and len(set(ours[:20])) == 20
    assert learning_rate(0, **RUN | {"total_steps": 1}, schedule=schedule) in (1e-3, 1e-5)


@pytest.mark.parametrize(
    "schedule, corners",
    [
        ("exp", {0: 1e-5, 5: 1e-3 * 0.505, 54: 1e-4, 99: 1e-5}),  # half-way in the exponent
        ("rwkv-lm", {0: 1e-5, 5: 1e-3 * 0.505, 10: 1e-3, 55: (1e-3 + 1e-5) / 2}),
        ("rwkv-peft", {0: 1e-3, 50: (1e-3 + 1e-5) / 2}),  # no warm-up, and lr_final a step after the run
        ("cosine", {0: 1e-4, 9: 1e-3, 10: 1e-3, 99: 1e-5}),
        ("linear", {0: 1e-4, 9: 1e-3, 10: 1e-3, 99: 1e-5}),
        ("constant", {0: 1e-4, 9: 1e-3, 99: 1e-3}),
        ("wsd", {0: 1e-4, 9: 1e-3, 90: 1e-3, 99: 1e-5}),  # stable until its last tenth
    ],
)
def test_the_corners_of_schedules(schedule, corners):
    rates = [learning_rate(step, warmup_steps=10, schedule=schedule, **RUN) for step in range(100)]
    assert [rates[step] for step in corners] == pytest.approx([*corners.values()])
    after = rates[10:]
    assert after == sorted(after, reverse=True)
