"""Numbers that flags take, by themselves and in JSON values: finite, and within bounds."""

import pytest

from training.command_lines import flags, refused, small_files, without_rank

files = small_files


def lora(files, method, settings, *more):
    """The flags of a method whose settings are a JSON value."""
    name = "pissa_config" if method == "pissa" else "lora_config"
    return without_rank(files, "--peft", method, f"--{name}", settings, *more)


@pytest.mark.parametrize(
    "flag, value",
    [
        *((flag, "nan") for flag in "lr_init lr_final weight_decay beta1 beta2 adam_eps gradient_clip_val".split()),
        ("val_split", "nan"),
        ("save_minutes", "nan"),
        ("lr_init", "1e400"),
        ("lr_final", "-inf"),
    ],
)
def test_flags_take_finite_numbers(files, monkeypatch, capsys, flag, value):
    argv = flags(files, f"--{flag}={value}")
    assert f"--{flag}: {value} is not a finite number" in refused(monkeypatch, capsys, argv)


@pytest.mark.parametrize(
    "method, settings, words",
    [
        ("lora", '{"lora_r":4,"lora_alpha":NaN}', "lora_alpha nan is not a finite number"),
        ("lora", '{"lora_r":4,"lora_alpha":1' + 400 * "0" + "}", "not a finite number"),
        ("lora", '{"lora_r":4,"lora_dropout":Infinity}', "lora_dropout inf is not a finite number"),
        ("lora", '{"lora_r":4,"lora_alpha":0}', "lora_alpha 0 must be above 0"),
        ("lora", '{"lora_r":4,"lora_alpha":-8}', "lora_alpha -8 must be above 0"),
        ("lora", '{"lora_r":4,"lora_parts":"att,time"}', "--train_parts"),
        ("pissa", '{"pissa_r":4,"svd_niter":-1}', "svd_niter -1"),
        ("pissa", '{"pissa_r":4,"pissa_init":"init_pissa.pth"}', "pissa_init (init_pissa.pth)"),
    ],
)
def test_numbers_of_the_json_forms_have_bounds(files, monkeypatch, capsys, method, settings, words):
    assert words in refused(monkeypatch, capsys, lora(files, method, settings))


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("keep_checkpoints", "-1", "-1 is negative"),
        ("keep_checkpoints", "2.5", "'2.5' is not a whole number"),
        ("save_every", "-1", "-1 is negative"),
        ("save_minutes", "-1", "-1 is negative"),
        ("save_total_limit", "3", "it is --keep_checkpoints"),
    ],
)
def test_how_often_and_how_much_is_saved_is_a_number_that_can_be_meant(files, monkeypatch, capsys, flag, value, words):
    assert words in refused(monkeypatch, capsys, flags(files, f"--{flag}={value}"))


@pytest.mark.parametrize(
    "ratio, words", [("inf", "not a finite number"), ("nan", "not a finite number"), ("0", "not above 0")]
)
def test_the_ratio_of_lora_plus_is_finite_and_above_0(files, monkeypatch, capsys, ratio, words):
    argv = lora(files, "lora-plus", '{"lora_r":4}', "--loraplus_lr_ratio", ratio)
    assert f"--loraplus_lr_ratio: {ratio} is {words}" in refused(monkeypatch, capsys, argv)
