"""Pictures of runs: metrics are read as they were written, any number of points and runs makes a picture, which names
its curves and their units; mistakes are refused."""

import json
import re

import pytest

from rwkv_peft.cli.commands import main
from rwkv_peft.cli.errors import UserError
from rwkv_peft.plots import curves_of, plot_loss, read_metrics, series, smooth, tokens_at, unit_of, wants_logarithm


def write_metrics(folder, count, **more):
    folder.mkdir(exist_ok=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(count):
            record = {"step": step, "loss": 2 / (step + 1), "lr": 1e-3, "grad_norm": 1.0, "tokens": 2_000_000}
            record |= {"tokens_per_s": 100.0} | more
            if step % 10 == 9:
                record |= {"val_loss": 2.5 / (step + 1), "retain_loss": 1.5, "eval_score": 0.5}
                record |= {"loss/a": 2.0, "val_loss/b$": 0.5}
            file.write(json.dumps(record) + "\n")
    return folder / "metrics.jsonl"


@pytest.fixture
def runs(tmp_path):
    """Folders of two runs, one of them validated."""
    write_metrics(tmp_path / "bone", 50)
    write_metrics(tmp_path / "lora", 5)
    return tmp_path


def texts(svg):
    """The texts of an SVG by matplotlib, which draws them as paths and writes them into comments beside these."""
    return set(re.findall(r"<!-- (.*?) -->", svg.read_text()))


LOSSES = {"loss", "validation loss", "retained loss", "loss of a", "validation loss of b$"}


def test_the_curves_of_an_axis_share_a_panel_if_there_is_one_run(runs):
    assert main(["plot", str(runs / "bone"), str(runs / "x.svg")]) == 0
    named = {"nats per token", "step", "learning rate", "gradient norm", "tokens per second", "right answers (share)"}
    assert named | LOSSES <= texts(runs / "x.svg")
    assert main(["plot", str(runs / "lora"), "--output", str(runs / "y.svg"), "--x", "tokens"]) == 0
    found = texts(runs / "y.svg")
    assert {"loss (nats per token)", "million tokens"} <= found and not {"step", "validation loss"} & found
    plot_loss(runs / "bone" / "metrics.jsonl", runs / "loss.png")  # as a run does
    assert main(["plot", str(runs / "bone"), str(runs / "drawn.png")]) == 0
    assert (runs / "drawn.png").read_bytes() == (runs / "loss.png").read_bytes()


def test_of_several_runs_each_curve_has_a_panel(runs):
    paths = str(runs / "bone"), str(runs / "lora" / "metrics.jsonl")
    assert main(["plot", *paths, "--output", str(runs / "compare.svg")]) == 0
    panels = {"step", "learning rate", "gradient norm", "tokens per second", "right answers (share)"}
    assert {"bone", "lora"} | panels | {f"{name} (nats per token)" for name in LOSSES} <= texts(runs / "compare.svg")
    write_metrics(runs / "pairs", 2, margin=0.0)
    assert main(["plot", *paths, str(runs / "pairs"), str(runs / "p.svg")]) == 0
    assert {"loss (nats per pair or token)", "margin (nats)"} <= texts(runs / "p.svg")


@pytest.mark.parametrize("count", [0, 1, 50])
def test_any_number_of_points_makes_a_picture_and_leaves_matplotlibs_backend_alone(tmp_path, count):
    matplotlib = pytest.importorskip("matplotlib")
    before = matplotlib.rcParams._get_backend_or_none()
    plot_loss(write_metrics(tmp_path / "run", count), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert matplotlib.rcParams._get_backend_or_none() == before


def test_a_series_holds_the_steps_that_have_the_value(tmp_path):
    records = read_metrics(write_metrics(tmp_path / "run", 20))
    assert series(records, "val_loss") == ([10, 20], [0.25, 0.125]) and series(records, "absent") == ([], [])
    assert series([{"step": 0, "loss": None}, {"step": 1, "loss": 2.0}], "loss") == ([2], [2.0])
    assert [curve.name for curve in curves_of(records[:5])] == ["loss", "lr", "grad_norm", "tokens_per_s"]
    assert tokens_at([{"step": 3, "tokens": 500_000}, {"step": 4}, {"step": 5, "tokens": 10**6}]) == {
        4: 0.5,
        5: 0.5,
        6: 1.5,
    }


@pytest.mark.parametrize(
    "figures, unit, axes",
    [
        ({}, "token", set()),
        ({"margin": 0.1, "accuracy": 0.5}, "pair", {"share", "margin (nats)"}),
        ({"accuracy": 0.5, "margin": 0.0, "kl": 0.0}, "answer", {"share", "margin (nats)"}),
    ],
)
def test_the_figures_of_an_objective_give_the_unit_of_its_loss_and_are_drawn(figures, unit, axes):
    records = [{"step": step, "loss": 0.6, **figures} for step in range(2)]
    assert unit_of(records) == unit
    assert axes <= {curve.axis for curve in curves_of(records)}


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smooth([4.0, 0.0])[0] == pytest.approx(4.0) and smooth([]) == []
    falling = [10.0 * 0.9**step for step in range(100)]
    assert wants_logarithm(falling) and not wants_logarithm(falling[:20]) and not wants_logarithm([0.0, *falling])


def test_runs_are_named_by_the_ends_of_their_paths_that_differ_and_names_are_no_formulas(tmp_path):
    names = ("x/run", "y/run", "$x", "a$x^$b", "$\\frac$")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_metrics(tmp_path / name, 2)
    assert main(["plot", *(str(tmp_path / name) for name in names), str(tmp_path / "out.svg")]) == 0
    assert set(names) <= texts(tmp_path / "out.svg")


def test_a_line_cut_off_at_the_end_is_left_out_and_one_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    assert len(read_metrics(path)) == 1
    for text in ('{"step": 0, "lo\n', '{"loss": 1.0}\n', '{"step": "a", "loss": 1.0}\n', "[]\n"):
        path.write_text(text + '{"step": 1, "loss": 1.0}\n')
        with pytest.raises(UserError, match="metrics.jsonl, line 1: (not JSON|a metrics line is a JSON object)"):
            main(["plot", str(path), str(tmp_path / "x.png")])


@pytest.mark.parametrize(
    "words, message",
    [
        (("bone", "--output", "x.jpg"), "does not end in .png, .svg, .pdf"),
        (("bone", "bone/metrics.jsonl"), "does not end in .png"),
        (("none", "x.png"), "none: no such file"),
        (("bone",), "runs and one picture are due: rwkv-peft plot RUN loss.png"),
        (("bone", "x.png", "--output", "x.png"), "runs and one picture are due"),
        (("bone", "bone/metrics.jsonl/x.png"), "a file stands where"),
        (("bone", "folder.png"), "is a folder"),
        (("bone", "x.png", "--panels"), "there is no --panels here; it is what it does by itself"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(runs, words, message):
    (runs / "folder.png").mkdir()
    before = (runs / "bone" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=message):
        main(["plot", *(word if word.startswith("--") else str(runs / word) for word in words)])
    assert not (runs / "x.png").exists() and (runs / "bone" / "metrics.jsonl").read_bytes() == before
