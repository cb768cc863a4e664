"""Pictures of several runs: telling runs apart, drawing their curves, and refusing mistakes."""

import json
import re

import pytest

from rwkv_peft.cli.commands import main
from rwkv_peft.cli.errors import UserError
from rwkv_peft.plots import plot_loss
from rwkv_peft.tools.plot import PlottedRun, labels, places


@pytest.fixture
def runs(tmp_path):
    """Folders of two runs, one of them validated."""
    for name, steps in (("bone", 50), ("lora", 5)):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "metrics.jsonl", "w") as file:
            for step in range(steps):
                record = {"step": step, "loss": 2 / (step + 1), "lr": 1e-3, "grad_norm": 1.0, "tokens": 2_000_000}
                record |= {"tokens_per_s": 100.0} | (
                    {"val_loss": 3.0, "eval_score": 0.5} if name == "bone" and step % 10 == 9 else {}
                )
                file.write(json.dumps(record) + "\n")
    return tmp_path


def texts(svg):
    """The texts of an SVG by matplotlib, which draws them as paths and writes them into comments beside these."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text())


def test_a_picture_names_its_runs_and_the_units_of_its_axes(runs):
    output = runs / "compare.svg"
    assert main(["plot", str(runs / "bone"), str(runs / "lora" / "metrics.jsonl"), "--output", str(output)]) == 0
    for words in (
        "bone", "lora", "step", "loss (nats per token)", "validation loss (nats per token)", "learning rate",
        "gradient norm", "tokens per second", "right answers (share)",
    ):  # fmt: skip
        assert words in texts(output)


def test_losses_of_pairs_are_told_as_such(runs):
    pairs = runs / "pairs.jsonl"
    pairs.write_text(json.dumps({"step": 0, "loss": 0.7, "margin": 0.0}) + "\n")
    for others, unit in (((), "pair"), ((str(runs / "bone"),), "pair or token")):
        assert main(["plot", "--panels", str(pairs), *others, str(runs / "p.svg")]) == 0
        assert f"loss (nats per {unit})" in texts(runs / "p.svg")


def test_what_no_run_recorded_has_no_panel_and_tokens_may_run_along(runs):
    output = runs / "one.svg"
    assert main(["plot", str(runs / "lora"), str(output), "--panels", "--x", "tokens", "--smooth", "0"]) == 0
    found = texts(output)
    assert (
        {"million tokens", "gradient norm"} <= {*found}
        and "step" not in found
        and "validation loss (nats per token)" not in found
    )


def test_a_run_without_a_step_makes_a_picture(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(["plot", "--panels", str(tmp_path), str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_runs_stand_at_their_steps_or_at_the_tokens_up_to_them():
    run = PlottedRun("x", [{"step": 3, "tokens": 500_000}, {"step": 4}, {"step": 5, "tokens": 1_000_000}])
    assert places(run, by_tokens=False) == {4: 4, 5: 5, 6: 6}
    assert places(run, by_tokens=True) == {4: 0.5, 5: 0.5, 6: 1.5}


def test_labels_are_the_shortest_ends_that_differ(tmp_path):
    a, b = tmp_path / "x" / "run", tmp_path / "y" / "run"
    assert labels([a, b]) == ["x/run", "y/run"] and labels([a]) == ["run"]
    assert labels([a, a]) == [f"{'/'.join(a.parts)} (1)", f"{'/'.join(a.parts)} (2)"]


@pytest.mark.parametrize(
    "words, message",
    [
        (("bone", "--output", "x.jpg"), "does not end in .png, .svg, .pdf"),
        (("none", "--output", "x.png"), "none: no such file"),
        (("bone", "--output", "x.png", "--smooth", "1"), "--smooth: 1 must be below 1"),
        (("bone",), "runs and one picture are due: rwkv-peft plot RUN loss.png"),
        (("bone", "x.png", "--x", "tokens"), "--x tokens needs --panels or several runs: .* add --panels for one"),
    ],
)
def test_mistakes_are_told(runs, words, message):
    paths = [str(runs / word) if word in ("bone", "none") or "." in word else word for word in words]
    with pytest.raises(UserError, match=message):
        main(["plot", *paths])
    assert not (runs / "x.png").exists()


@pytest.mark.parametrize("name", ["$", "$x", "a$x^$b", "$\\frac$"])
def test_a_run_s_name_is_no_formula(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    assert main(["plot", "--panels", str(tmp_path / name), "--output", str(tmp_path / "out.svg")]) == 0
    assert name in texts(tmp_path / "out.svg")


def test_the_curve_of_one_run_is_that_of_its_loss_png_in_any_format(runs):
    assert main(["plot", str(runs / "bone"), str(runs / "drawn.png")]) == 0
    plot_loss(runs / "bone" / "metrics.jsonl", runs / "loss.png")
    assert (runs / "drawn.png").read_bytes() == (runs / "loss.png").read_bytes()
    assert main(["plot", str(runs / "bone"), "--output", str(runs / "drawn.svg")]) == 0
    assert {"loss, smoothed", "learning rate"} <= set(texts(runs / "drawn.svg"))
