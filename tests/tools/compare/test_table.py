"""The table shows each method's best rate, and all its other numbers follow from the runs."""

import json
import math

import pytest

from rwkv_peft.tools.compare.plan import Cell, Size
from rwkv_peft.tools.compare.report import (
    change_at,
    common_rate,
    draw_figures,
    lines_of_json,
    loss_of_all,
    retained_curve,
    rows_of,
    steps_to,
    table,
)
from rwkv_peft.tools.compare.runs import Outcome

SIZES = {"bone": Size(8, 0, 1000), "lora": Size(4, 0, 1000, 50), "bone-mini": Size(10, 20, 900)}


def outcome(method, rate, seed, *losses, diverged=False):
    validations = tuple((10 * n, 0.5 * n, loss) for n, loss in enumerate(losses, start=1))
    return Outcome(Cell(method, rate, seed), math.inf if diverged else losses[-1], validations, 50.0, 600.0)


def by_cell(*runs):
    return {run.cell: run for run in runs}


RUNS = by_cell(
    *(outcome("bone", -6, 1, 3.0, 2.5), outcome("bone", -5, 1, 2.8, 2.0), outcome("bone", -5, 2, 2.4, 2.2)),
    *(outcome("bone", -4, 1, 9.0, diverged=True), outcome("lora", -6, 1, 3.5, 3.0)),
    *(outcome("lora", -5, 1, 3.0, 2.6), outcome("lora", -4, 1, 2.9, 2.7)),
)
METHODS = ["lora", "bone", "bone-mini"]


@pytest.fixture
def rows():
    return rows_of(METHODS, [1, 2], SIZES, RUNS)


def test_rows_stand_at_the_best_rate_of_the_first_seed_with_all_its_seeds(rows):
    assert [(row.method, row.rate, row.losses) for row in rows] == [("bone", -5, (2.0, 2.2)), ("lora", -5, (2.6,))]
    assert rows[0].mean == pytest.approx(2.1) and rows[0].spread == pytest.approx(math.sqrt(0.02))
    assert math.isnan(rows[1].spread)


def test_the_common_rate_is_one_that_all_have_run_and_none_diverged_at():
    losses = {cell: run.loss for cell, run in RUNS.items()}
    assert common_rate(["bone", "lora"], 1, losses) == -5
    assert common_rate(METHODS, 1, losses) is None


def test_steps_are_counted_on_the_mean_of_the_seeds(rows):
    assert [steps_to(rows[0], loss) for loss in (2.6, 2.59, 2.1, 1.0)] == [10, 20, 20, None]


def test_the_table_says_so(rows):
    assert table(rows, 1, RUNS).splitlines() == [
        "| method | rank | trained parameters | best rate | seeds | validation loss | ± (standard deviation) "
        "| loss at rate 0.003 for all | steps to lora's loss | ms a step | peak memory, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        "| bone | 8 | 1,000 | 0.003 | 2 | 2.1000 | 0.1414 | 2.0000 | 10 | 50 | 600 |",
        "| lora | 4 | 1,050 | 0.003 | 1 | 2.6000 |  | 2.6000 | 20 | 50 | 600 |",
    ]


def test_runs_that_diverged_are_marked_and_no_steps_are_counted_to_their_loss():
    runs = by_cell(outcome("bone-mini", -5, 1, 9.0, diverged=True))
    text = table(rows_of(["bone-mini"], [1], SIZES, runs), 1, runs)
    assert "| bone-mini | 10, 20 | 900 | 0.003 | 1 | diverged |" in text and "loss at" not in text
    runs = RUNS | by_cell(outcome("lora", -5, 2, 2.5, 9.0, diverged=True))
    text = table(rows_of(METHODS, [1, 2], SIZES, runs), 1, runs)
    assert "| lora | 4 | 1,050 | 0.003 | 2 | diverged |" in text and "steps to" not in text


def test_each_run_is_a_line_of_json():
    records = [json.loads(line) for line in lines_of_json(SIZES, RUNS).splitlines()]
    assert len(records) == len(RUNS)
    found = {(record["method"], record["rate"], record["seed"]): record["val_loss"] for record in records}
    assert found["bone", 0.003, 2] == 2.2 and found["bone", 0.01, 1] is None
    assert {record["method"]: record["parameters"] for record in records} == {"bone": 1000, "lora": 1050}


def retaining(run, *losses):
    return run._replace(retained=losses)


# of a base at 1.0; bone's mean validation losses are 2.6 and 2.1, lora's 3.0 and 2.5
RETAINING = RUNS | by_cell(
    retaining(RUNS[Cell("bone", -5, 1)], 1.0, 1.2, 1.3),
    retaining(RUNS[Cell("bone", -5, 2)], 1.0, 1.0, 1.5),
    retaining(outcome("lora", -5, 1, 3.0, 2.5), 1.0, 1.4, 1.25),
)


def test_what_is_forgotten_is_told_at_the_end_and_at_a_loss_that_all_reach():
    rows = rows_of(METHODS, [1, 2], SIZES, RETAINING)
    assert rows[0].retained == (1.3, 1.5) and rows[0].changes == pytest.approx((0.3, 0.5))
    assert [retained_curve(row) for row in rows] == [
        [(pytest.approx(2.6), pytest.approx(0.1)), (pytest.approx(2.1), pytest.approx(0.4))],
        [(3.0, pytest.approx(0.4)), (2.5, 0.25)],
    ]
    assert loss_of_all(rows) == 2.5
    assert change_at(rows[1], 2.6) == pytest.approx(0.25 + 0.15 / 5)
    assert math.isnan(change_at(rows[1], 2.4)) and math.isnan(change_at(rows[1], 3.5))
    head, _, bone, lora = table(rows, 1, RETAINING).splitlines()
    told = " retained loss | change from the base | ± of the change | change at validation loss 2.5000 |"
    assert told in head
    assert " 1.4000 | +0.4000 | 0.1414 | +0.1600 |" in bone and " 1.2500 | +0.2500 |  | +0.2500 |" in lora
    records = [json.loads(line) for line in lines_of_json(SIZES, RETAINING).splitlines()]
    assert [record["retained"] for record in records if record["method"] == "lora"] == [[], [1.0, 1.4, 1.25], []]


def test_what_a_run_forgot_that_diverged_is_not_told():
    cell = Cell("bone-mini", -5, 1)
    runs = RETAINING | {cell: retaining(outcome("bone-mini", -5, 1, 9.0, diverged=True), 1.0)}
    rows = rows_of(METHODS, [1, 2], SIZES, runs)
    assert loss_of_all(rows) == 2.5
    assert "| diverged | diverged |  |  |" in table(rows, 1, runs).splitlines()[-1]


def test_figures_are_drawn_and_that_of_retained_losses_where_they_were_measured(rows, tmp_path):
    draw_figures(tmp_path, rows, METHODS, 1, RUNS)
    assert not (tmp_path / "retained.png").exists()
    draw_figures(tmp_path, rows_of(METHODS, [1, 2], SIZES, RETAINING), METHODS, 1, RETAINING)
    for name in ("steps", "time", "rates", "retained"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert ">bone<" not in (svg := (tmp_path / f"{name}.svg").read_text()) and "<svg" in svg
