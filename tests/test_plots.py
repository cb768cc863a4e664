"""Loss curves: metrics are read as they were written, and any number of points makes a picture."""

import json
import os

import pytest

from rwkv_peft.checkpoints.best import validations
from rwkv_peft.cli.errors import UserError
from rwkv_peft.plots import (
    COLORS,
    DRAWN,
    HELD_OUT,
    by_source,
    drawn_below,
    plot_loss,
    read_metrics,
    series,
    smooth,
    smooth_drawn,
    unit_of,
    wants_logarithm,
)
from rwkv_peft.tools.plot import main

LOSS = ("loss", "loss", "tab:blue")
PNG = b"\x89PNG\r\n\x1a\n"


def write_metrics(path, count, every=10):
    with open(path, "w") as file:
        for step in range(count):
            record = {"step": step, "loss": 2 / (step + 1), "lr": 1e-3, "tokens_per_s": 100.0}
            if step % every == every - 1:
                record |= {"val_loss": 2.5 / (step + 1), "retain_loss": 1.5, "eval_score": 0.5}
                record |= {"lm_eval/t/acc": 0.4, "lm_eval/t/perplexity": 9.0}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_any_number_of_points_makes_a_picture(tmp_path, count):
    metrics, picture = write_metrics(tmp_path / "metrics.jsonl", count), tmp_path / "loss.png"
    plot_loss(metrics, picture)
    assert picture.read_bytes().startswith(PNG)


def test_drawing_leaves_the_users_matplotlib_backend_alone(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    before = matplotlib.rcParams._get_backend_or_none()
    plot_loss(write_metrics(tmp_path / "metrics.jsonl", 3), tmp_path / "loss.png")
    assert matplotlib.rcParams._get_backend_or_none() == before


def test_a_series_holds_the_steps_that_have_the_value(tmp_path):
    records = read_metrics(write_metrics(tmp_path / "metrics.jsonl", 20))
    assert series(records, "val_loss") == ([10, 20], [0.25, 0.125])
    assert series(records, "absent") == ([], [])
    assert series([{"step": 0, "loss": None}, {"step": 1, "loss": 2.0}], "loss") == ([2], [2.0])


def test_the_losses_of_several_files_are_drawn_in_the_colour_of_the_loss(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": n, "loss": 1.0, "loss/a": 2.0, "loss/b$": 0.5}) + "\n" for n in range(3))
    )
    labels = {label: (look["linestyle"], values) for label, look, _, values in by_source(read_metrics(path), *LOSS)}
    assert labels == {"loss of a": ("--", [2.0] * 3), r"loss of b\$": ("-.", [0.5] * 3)}
    plot_loss(path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_the_shares_of_right_answers_are_drawn(tmp_path):
    records = read_metrics(write_metrics(tmp_path / "metrics.jsonl", 20))
    shares = {"right answers": ([10, 20], [0.5, 0.5]), "t/acc": ([10, 20], [0.4, 0.4])}
    assert drawn_below(records) == {"share": shares} and drawn_below(records[:5]) == {}


def test_the_loss_of_preference_training_is_a_mean_over_pairs(tmp_path):
    records = read_metrics(write_metrics(tmp_path / "metrics.jsonl", 2))
    assert unit_of(records) == "token" and unit_of([*records, {"step": 2, "loss": 0.6, "margin": 0.1}]) == "pair"
    assert unit_of([{"step": 0, **dict.fromkeys(("accuracy", "margin", "kl"), 0.0)}]) == "answer"


def test_margins_and_the_order_of_pairs_are_drawn_where_a_run_has_them(tmp_path):
    records = [{"step": step, "loss": 0.6, "margin": 0.1 * step, "accuracy": 0.5} for step in range(2)]
    shares, margins = {"preferred as the rows say": ([1, 2], [0.5, 0.5])}, {"margin": ([1, 2], [0.0, 0.1])}
    assert drawn_below(records) == {"share": shares, "margin (nats)": margins}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    write_metrics(tmp_path / "plain.jsonl", 2)
    plot_loss(tmp_path / "plain.jsonl", tmp_path / "plain.png")
    assert height(tmp_path / "loss.png") > height(tmp_path / "plain.png")


def height(picture):
    """The height in pixels, from the header of a PNG."""
    return int.from_bytes(picture.read_bytes()[20:24], "big")


def test_each_curve_has_its_colour():
    """In one picture: the loss, the curves on held-out data, and all that is drawn below them."""
    used = ["tab:blue", *(color for _, _, color in HELD_OUT), *COLORS]
    assert len(set(used)) == len(used) and len(COLORS) >= DRAWN + 4


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smooth([4.0, 0.0])[0] == pytest.approx(4.0)
    assert smooth([]) == []


def test_what_falls_on_a_logarithmic_axis_is_smoothed_as_it_is_seen_there():
    falling = [10.0 * 0.9**step for step in range(100)]
    assert wants_logarithm(falling) and not wants_logarithm(falling[:20]) and not wants_logarithm([0.0, *falling])
    seen, mean = smooth_drawn(falling, True), smooth_drawn(falling, False)
    assert mean == smooth(falling) and max(a / b for a, b in zip(mean, falling)) > 5
    assert all(value <= line < 3 * value for value, line in zip(falling, seen))


def test_a_line_cut_off_at_the_end_is_left_out_and_one_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    assert len(read_metrics(path)) == 1
    path.write_text('{"step": 0, "lo\n{"step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match="line 1"):
        read_metrics(path)


@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
def test_metrics_of_a_run_that_are_no_file_are_neither_waited_for_nor_read(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="metrics.jsonl is no file"):
        main([str(tmp_path), str(tmp_path / "loss.png")])


def test_the_picture_is_named_once_by_itself_or_by_a_flag(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", 3)
    run, picture = str(tmp_path), str(tmp_path / "loss.png")
    assert main([run, "--output", picture]) == 0 and (tmp_path / "loss.png").stat().st_size
    for named in ([], [picture, "--output", picture]):
        with pytest.raises(UserError, match="one picture are due: rwkv-peft plot RUN loss.png"):
            main([run, *named])


@pytest.mark.parametrize(
    "output, words",
    [
        ("loss.jpg", "does not end in .png, .svg, .pdf"),
        ("metrics.jsonl", "does not end in .png"),
        ("metrics.jsonl/loss.png", "a file stands where"),
        ("folder.png", "is a folder"),
    ],
)
def test_an_output_that_is_no_picture_or_cannot_be_written_is_refused(tmp_path, output, words):
    (tmp_path / "folder.png").mkdir()
    metrics = write_metrics(tmp_path / "metrics.jsonl", 3)
    before = metrics.read_bytes()
    with pytest.raises(UserError, match=words):
        main([str(metrics), str(tmp_path / output)])
    assert metrics.read_bytes() == before


@pytest.mark.parametrize("line", ['{"loss": 1.0}', '{"step": "a", "loss": 1.0}', "[]"])
def test_lines_of_another_file_are_refused(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text(line + "\n" + line + "\n")
    with pytest.raises(UserError, match="line 1: a metrics line is a JSON object with its step"):
        main([str(tmp_path / "rows.jsonl"), str(tmp_path / "loss.png")])


def test_metrics_of_a_tebibyte_that_is_nowhere_are_refused_at_once(tmp_path):
    with open(path := tmp_path / "metrics.jsonl", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="metrics.jsonl, line 1: not JSON"):
        read_metrics(path)
    assert list(validations(path)) == []
