"""`rwkv-peft compare` as a user types it: existing runs are kept, missing ones are run, mistakes are reported first;
the order of runs, the matching of sizes, and the table."""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.checkpoints.lock import alone_in
from rwkv_peft.children import python_command
from rwkv_peft.cli.errors import UserError, ending_in_order, hangup_signals
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.tools.compare import command, runs
from rwkv_peft.tools.compare.command import main, measure, usual_rates
from rwkv_peft.tools.compare.flags import parse_flags
from rwkv_peft.tools.compare.report import draw, lines_of_json, rows_of, table
from rwkv_peft.tools.compare.runs import Outcome, finish, run_cell
from rwkv_peft.tools.compare.sweep import (
    HIGHEST,
    LOWEST,
    Cell,
    Layers,
    Size,
    best_rate,
    grid_rate,
    matched_size,
    next_cells,
    parameter_count,
    rate_of,
    settings_of,
)
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.inputs import VALIDATION, find_samples
from rwkv_peft.training.saving.checkpoints import DIVERGED, find_checkpoint

MODEL = ("--load_model", "base.pth", "--data_file", "data", "--ctx_len", "16", "--accelerator", "cpu")
TRAIN = (*MODEL, "--val_split", "0.2")
OWN = ("--methods", "bone", "lora", "--rank", "8", "--seeds", "7", "--steps", "2")
CELL = Cell("bone", -6, 7)


def write_data(path, first=7):
    with ShardWriter(path, vocab_size=80) as writer:
        for document in range(20):
            writer.add([1 + (document + first * i) % 79 for i in range(30)] + [0])


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_state):
    folder = tmp_path_factory.mktemp("compare")
    torch.save(tiny_state(n_layer=1), folder / "base.pth")
    write_data(folder / "data")
    return folder


@pytest.fixture(autouse=True)
def there(files, monkeypatch):
    """The folder of a tiny base.pth and of its data is the current one."""
    monkeypatch.chdir(files)


def keep(folder, cell, loss):
    """Write a complete run, as an earlier command left it."""
    path = folder / "runs" / cell.folder
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_bytes(metrics(val_loss=loss))
    (path / "result.json").write_bytes(result(**cell._asdict()))


def metrics(**values):
    record = {"step": 1, "val_loss": 1.0, "tokens": 32, "tokens_per_s": 64.0} | values
    return json.dumps(record).encode() + b"\n"


def result(**values):
    record = {"method": "bone", "rate": -6, "seed": 7, "diverged": False, "peak_mb": 500.0} | values
    return json.dumps(record).encode()


def test_due_runs_are_run_and_complete_ones_are_kept(files, capsys, warm_python):
    folder = files / "out"
    for method in ("bone", "lora"):
        for rate in (-6, -4):
            keep(folder, Cell(method, rate, 7), 99.0)
    command = [*OWN, "--output", str(folder), "--rates", "1e-3", "1e-2", "3e-3"]
    train = [*TRAIN, "--retain_data", "data"]
    assert main([*command, "--", *train]) == 0
    told = capsys.readouterr().out
    assert "2 runs due\n" in told
    assert re.search(r"^lora, rate 0.003, seed 7: validation loss \d\.\d{4}, ", told, re.MULTILINE)
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    measured = [record["retained"] for record in records if record["rate"] == 0.003]
    assert [len(losses) for losses in measured] == [3, 3]  # before the first step, and after each of two
    assert measured[0][0] == pytest.approx(measured[1][0])  # which is the base's
    assert len(records) == 6 and {record["parameters"] for record in records} == {8 * (6 * 64 + 64 + 96)}
    text = (folder / "table.md").read_text()
    assert text in told and text.count("| 0.003 | 1 |") == 2 and "| retained loss | change from the base |" in text
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    flags = json.loads((folder / "runs" / "bone-0.003-7" / "config.json").read_text())
    assert flags["train"]["lr_init"] == 0.003 and flags["train"]["lr_final"] == pytest.approx(3e-4)
    found = [folder / "runs" / f"{method}-0.003-7" for method in ("bone", "lora")]
    first = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) for run in found]
    # fresh adapters change nothing, so that equal losses mean equal data
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-3)
    assert main([*command, "--", *train]) == 0  # and now nothing is due
    assert "due" not in (out := capsys.readouterr().out) and text in out
    with alone_in(folder), pytest.raises(UserError, match="--output .*: a run is training there"):
        main([*command, "--", *train])
    with pytest.raises(UserError, match=r"other settings \(steps: 2, and now 3\)"):
        main([*command, "--steps", "3", "--", *train])


NOT_COMPLETE = "are not those of the complete run that its name tells; remove the folder"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("result.json", b"[1]", "result.json holds no settings, but a list"),
        ("result.json", b"\xff{}", "result.json is not JSON"),
        ("result.json", b"{}", NOT_COMPLETE),
        ("result.json", result(seed=8), NOT_COMPLETE),
        ("result.json", result(rate="-6"), NOT_COMPLETE),
        ("metrics.jsonl", b"", NOT_COMPLETE),
        ("metrics.jsonl", metrics(tokens="32"), NOT_COMPLETE),
        ("metrics.jsonl", b"\xff\n{}\n", "metrics.jsonl, line 1: not JSON"),
        ("compare.json", b"[]", "compare.json holds no settings, but a list"),
    ],
)
def test_damaged_files_of_runs_are_told(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(command, "run_due", lambda *_: None)
    words = [*OWN, "--output", str(tmp_path), "--rates", "1e-3", "--", *TRAIN]
    keep(tmp_path, CELL, 1.0)
    assert main(words) == 0
    (tmp_path / name if name == "compare.json" else tmp_path / "runs" / CELL.folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        main(words)


def test_settings_by_which_no_run_got_anywhere_are_forgotten(files, monkeypatch):
    monkeypatch.setattr(command, "run_due", lambda *_: None)
    words = [*OWN, "--output", str(files / "mistaken"), "--rates", "1e-3", "--", *TRAIN, "--data_file"]
    for data in ("absent", "data"):
        assert main([*words, data]) == 0
    keep(files / "mistaken", CELL, 1.0)
    with pytest.raises(UserError, match="other settings \\(train: "):
        main([*words, "absent"])


@pytest.mark.parametrize("rows", ["data", "held_out", "kept"])
def test_runs_on_other_data_have_no_place_in_the_table(files, monkeypatch, rows):
    """All files have one name and size; the validation's data and --retain_data count as well."""

    def write(first):
        for name in ("data", "held_out", "kept"):
            write_data(files / f"of-{rows}-{name}", first if name == rows else 7)

    monkeypatch.setattr(command, "run_due", lambda *_: None)
    flags = {"--data_file": "data", "--val_data": "held_out", "--retain_data": "kept"}
    data = [word for flag, name in flags.items() for word in (flag, f"of-{rows}-{name}")]
    words = [*OWN, "--output", f"out-{rows}", "--rates", "1e-3", "--", *MODEL, *data]
    write(7)
    assert main(words) == 0
    keep(files / f"out-{rows}", CELL, 1.0)
    write(7)  # the same content again is no other data
    assert main(words) == 0
    write(11)
    with pytest.raises(UserError, match="other settings \\(files: "):
        main(words)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "flags of train.py are missing"),
        (["--"], "flags of train.py are missing"),
        (["--", *MODEL], "needs --val_data or --val_split: .* add one of them after --"),
        (["--", *TRAIN, "--lr_init=1e-3"], "--lr_init=1e-3 after --: the comparison sets it"),
        (["--", *TRAIN, "--lerning_rate", "1"], "there is no --lerning_rate"),
        (["--methods", "bona", "--", *TRAIN], "invalid choice: 'bona'"),
        (["--methods", "full", "bone", "--", *TRAIN], "put another method first"),
        (
            ["--methods", "bone", "full", "--", *TRAIN, "--train_parts", "ln"],
            "bone full does not go with --train_parts",
        ),
        (["--rates", "2e-3", "--", *TRAIN], "take 0.003"),
        (["--rank", "5", "--methods", "bat-in", "--", *TRAIN], "5"),
        (["--", *TRAIN, "--load_model", "absent.pth"], "absent.pth"),
        (["--rank", "8", "--", *TRAIN, "--data_type", "pairs"], "does not go with --objective dpo: it goes by the "),
    ],
)
def test_mistakes_are_told_before_a_run_begins(files, arguments, message):
    with pytest.raises(UserError, match=message):
        main(["--output", "refused", *arguments])
    assert not (files / "refused").exists()


@pytest.mark.parametrize("steps, every", [(1000, 100), (205, 21), (7, 1), (1, 1)])
def test_a_run_is_validated_ten_times_or_fewer(steps, every):
    assert parse_flags(["--output", "out", "--steps", str(steps), "--", *TRAIN]).val_every == every


def test_runs_of_all_seeds_validate_on_the_same_samples():
    kept = []
    for seed in (7, 8):
        comparison = parse_flags(["--output", "out3", *OWN, "--", *TRAIN])
        request = parse_run(runs.train_flags(comparison, Cell("bone", -6, seed), Size(8, 0, 1), Path("out3")))
        samples, measured = find_samples(request.config)
        kept.append([{held.unit(n) for n in range(len(held))} for held in (samples, measured[VALIDATION])])
        assert request.config.train.random_seed == seed
    assert kept[0] == kept[1]
    given = parse_flags(["--output", "out3", *OWN, "--", *TRAIN, "--val_seed", "3"])
    assert given.train == (*TRAIN, "--val_seed", "3")


def test_sizes_count_all_that_trains(files):
    methods = "bone", "lora", "dora", "full", "state"
    words = ["--output", "out2", "--methods", *methods, "--rank", "8", "--", *TRAIN]
    sizes, base = measure(parse_flags(words))
    bone = 8 * (6 * 64 + 64 + 96)  # layers with 64 outputs, and one with 96
    assert sizes["bone"] == Size(8, 0, bone) and sizes["lora"][2] == bone
    assert sizes["full"] == Size(0, 0, sum(tensor.numel() for tensor in base.tensors.values()))
    assert sizes["state"] == Size(0, 0, 4 * 16 * 16)  # one layer of four heads
    sizes, _ = measure(parse_flags([*words[:5], "--rank", "8", "--", *TRAIN, "--train_parts", "emb"]))
    assert sizes["bone"].trained == bone + base.tensors["emb.weight"].numel()


@pytest.mark.parametrize("channels, rates", [(64, [3e-4, 1e-3, 3e-3]), (4096, [1e-5, 3e-5, 1e-4])])
def test_without_rates_a_sweep_begins_about_the_rate_of_the_models_width(files, capsys, channels, rates):
    assert [rate_of(number) for number in usual_rates(channels)] == rates
    folder = files / f"usual-{channels}"
    for method in ("bone", "lora"):
        for rate, loss in zip(usual_rates(64), (2.0, 1.0, 2.0)):
            keep(folder, Cell(method, rate, 7), loss)
    assert main([*OWN, "--output", str(folder), "--", *TRAIN]) == 0
    out = capsys.readouterr().out
    assert "learning rates to begin with: 0.0003 0.001 0.003\n" in out and "due" not in out


def finish_all(methods, rates, seeds, loss):
    """Run whatever is due, with loss(cell) as its result -> {cell: loss}."""
    losses = {}
    while cells := next_cells(methods, rates, seeds, losses):
        assert len(set(cells)) == len(cells) and not losses.keys() & set(cells)
        losses |= {cell: loss(cell) for cell in cells}
    return losses


@pytest.mark.parametrize("best", [LOWEST, -9, -5, 0, HIGHEST])
@pytest.mark.parametrize("rates", [[-6], [-8, -7, -6], [-14, -2]])
def test_a_sweep_ends_where_both_neighbours_of_its_best_rate_are_worse(best, rates):
    losses = finish_all(["bone"], rates, [42], lambda cell: abs(cell.rate - best))
    assert best_rate("bone", 42, losses) == best
    assert all(Cell("bone", rate, 42) in losses for rate in (best - 1, best + 1) if LOWEST <= rate <= HIGHEST)


def test_rates_at_which_a_run_diverges_are_worse_than_any():
    losses = finish_all(["bone"], [-2, -1], [42], lambda cell: math.inf if cell.rate > -6 else -cell.rate)
    assert best_rate("bone", 42, losses) == -6


def test_methods_take_turns_and_the_other_seeds_follow_all_sweeps_at_the_best_rate_alone():
    assert next_cells(["bone", "lora"], [-6, -5], [1], {}) == [
        Cell(method, rate, 1) for rate in (-6, -5) for method in ("bone", "lora")
    ]
    best = {"bone": -6, "lora": -3}
    losses = finish_all(list(best), [-6, -5], [1, 2, 3], lambda cell: abs(cell.rate - best[cell.method]))
    others = {cell for cell in losses if cell.seed != 1}
    assert others == {Cell(method, rate, seed) for method, rate in best.items() for seed in (2, 3)}
    sweeping = {cell: loss for cell, loss in losses.items() if cell.seed == 1 and cell != Cell("lora", -2, 1)}
    assert next_cells(list(best), [-6, -5], [1, 2, 3], sweeping) == [Cell("lora", -2, 1)]


def test_rates_are_written_as_they_are_read_and_others_refused_with_the_nearest():
    assert [rate_of(number) for number in (-6, -5, -4, 0, 1)] == [0.001, 0.003, 0.01, 1.0, 3.0]
    numbers = range(LOWEST, HIGHEST + 1)
    assert [grid_rate(f"{rate_of(number):g}") for number in numbers] == list(numbers)
    for text, message in (("2e-3", "take 0.003"), ("0.0010001", "take 0.001"), ("0", "not above 0")):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            grid_rate(text)


LAYERS = Layers([(64, 64), (64, 64), (224, 64), (64, 224)])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wanted", [1, 5000, 10**9])
def test_no_rank_that_fits_is_nearer(name, wanted):
    """Ranks and counts are those of the tensors that the adapters' own code makes."""
    method = METHODS[name]

    def count(*size):
        shapes = [(number, method.tensors.shapes(settings_of(name, *size), *layer)) for layer, number in LAYERS.items()]
        return sum(number * math.prod(found[one]) for number, found in shapes for one in method.parameters)

    rank, mini = matched_size(name, wanted, LAYERS)
    fitting = [
        other
        for other in range(1, 225)
        if all(method.tensors.fit(settings_of(name, other, mini), *layer) is None for layer in LAYERS)
    ]
    assert rank in fitting and parameter_count(name, rank, mini, LAYERS) == count(rank, mini)
    assert abs(count(rank, mini) - wanted) == min(abs(count(other, mini) - wanted) for other in fitting)


def test_a_method_that_fits_at_no_rank_is_told():
    with pytest.raises(UserError, match="no rank of lora-ga fits every layer"):
        matched_size("lora-ga", 100, Layers([(1, 64)]))


@pytest.mark.parametrize(
    "code, log, diverged",
    [
        (0, "finished", False),
        (1, f"error: the loss became nan at step 3; {DIVERGED}. No checkpoint had been saved yet", True),
        (1, "error: rank 1 was ended by SIGKILL; no checkpoint had been saved yet; …", None),
        (2, "", None),
    ],
)
def test_a_run_that_diverged_is_a_result_and_one_that_failed_is_not(tmp_path, code, log, diverged):
    (tmp_path / "log.txt").write_text(log + "\n\n")
    if diverged is None:
        with pytest.raises(UserError, match=f"bone, rate 0.001, seed 7 ended with exit code {code}: {log[:9]}"):
            finish(CELL, tmp_path, code, 500.0)
        assert not (tmp_path / "result.json").exists()
        return
    finish(CELL, tmp_path, code, 500.0)
    assert json.loads((tmp_path / "result.json").read_text())["diverged"] is diverged


def test_a_comparison_that_is_killed_leaves_no_run_behind(files, warm_python):
    folder = files / "killed"
    run = folder / "runs" / CELL.folder
    metrics = run / "metrics.jsonl"  # empty until a step is done, from which on SIGTERM asks for a save
    words = ["--methods", "bone", "--rank", "8", "--seeds", "7", "--steps", "100000", "--output", folder]
    comparison = subprocess.Popen(python_command("rwkv_peft", "compare", *words, "--rates", "1e-3", "--", *TRAIN))
    try:
        wait_until(lambda: metrics.exists() and metrics.read_text() or comparison.poll() is not None)
    finally:
        comparison.kill()
        comparison.wait()
    wait_until(lambda: not trains(run))
    assert find_checkpoint(run), (run / "log.txt").read_text()  # with which the same command goes on


def trains(run):
    try:
        with alone_in(run):
            return False
    except UserError:
        return True


def wait_until(true, seconds=300):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.skipif(not hangup_signals(), reason="is to ignore it, as under nohup")
def test_a_signal_stops_the_run_and_reports(tmp_path, monkeypatch, capsys):
    began, wait4, popen = [], os.wait4, subprocess.Popen

    def begin(argv, **options):
        began.append(popen(["sleep", "600"], **options))
        return began[-1]

    def hang_up(*arguments):
        os.kill(os.getpid(), signal.SIGHUP)
        return wait4(*arguments)

    monkeypatch.setattr(runs.subprocess, "Popen", begin)
    monkeypatch.setattr(runs.os, "wait4", hang_up)
    with ending_in_order():
        code = main(["--output", str(tmp_path / "hung-up"), *OWN, "--rates", "1e-3", "--", *TRAIN])
    assert code == 128 + signal.SIGHUP and [process.returncode for process in began] == [-15]
    assert "no run with the first seed is complete yet" in capsys.readouterr().out


def test_a_run_that_left_no_checkpoint_begins_anew(tmp_path, monkeypatch):
    comparison, size = parse_flags(["--output", str(tmp_path), *OWN, "--", *TRAIN]), Size(8, 0, 100)
    run = tmp_path / "runs" / CELL.folder
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    with alone_in(run), pytest.raises(UserError, match="a run is training there"):
        run_cell(comparison, CELL, size)
    argvs = []

    def begin(argv, **options):
        argvs.append(argv)
        raise InterruptedError

    monkeypatch.setattr(runs.subprocess, "Popen", begin)
    for checkpoint in (None, run):  # of a run that has done its steps too, whose picture the disk refused
        monkeypatch.setattr(runs, "find_checkpoint", lambda folder, checkpoint=checkpoint: checkpoint)
        with pytest.raises(InterruptedError):
            run_cell(comparison, CELL, size)
        assert not (run / "metrics.jsonl").exists()
        assert (argvs[-1][-2:] == ["--resume", "auto"]) == (checkpoint is not None)


SIZES = {"bone": Size(8, 0, 1000), "lora": Size(4, 0, 1050), "bone-mini": Size(10, 20, 900)}


def outcome(method, rate, seed, *losses, diverged=False, retained=()):
    validations = tuple((10 * n, loss) for n, loss in enumerate(losses, start=1))
    return Outcome(Cell(method, rate, seed), math.inf if diverged else losses[-1], validations, 50.0, 600.0, retained)


def by_cell(*runs):
    return {run.cell: run for run in runs}


RUNS = by_cell(
    *(outcome("bone", -6, 1, 3.0, 2.5), outcome("bone", -5, 1, 2.8, 2.0), outcome("bone", -5, 2, 2.4, 2.2)),
    *(outcome("bone", -4, 1, 9.0, diverged=True), outcome("lora", -6, 1, 3.5, 3.0)),
    *(outcome("lora", -5, 1, 3.0, 2.6), outcome("lora", -4, 1, 2.9, 2.7)),
)
NAMES = ["lora", "bone", "bone-mini"]


def test_the_table_has_each_method_at_its_best_rate_with_all_seeds(tmp_path):
    rows = rows_of(NAMES, [1, 2], SIZES, RUNS)
    assert table(rows).splitlines() == [
        "| method | rank | trained parameters | best rate | seeds | validation loss | ± (standard deviation) "
        "| ms a step | peak memory, MB |",
        "|---|---|---|---|---|---|---|---|---|",
        "| bone | 8 | 1,000 | 0.003 | 2 | 2.1000 | 0.1414 | 50 | 600 |",
        "| lora | 4 | 1,050 | 0.003 | 1 | 2.6000 |  | 50 | 600 |",
    ]
    draw(tmp_path / "x.svg", rows, 1, RUNS)
    texts = set(re.findall(r"<!-- (.*?) -->", (tmp_path / "x.svg").read_text()))
    assert {"bone, rate 0.003", "lora, rate 0.003", "optimizer steps", "learning rate"} <= texts
    records = [json.loads(line) for line in lines_of_json(SIZES, RUNS).splitlines()]
    found = {(record["method"], record["rate"], record["seed"]): record["val_loss"] for record in records}
    assert len(found) == len(RUNS) and found["bone", 0.003, 2] == 2.2 and found["bone", 0.01, 1] is None
    assert {record["method"]: record["parameters"] for record in records} == {"bone": 1000, "lora": 1050}


def test_forgetting_and_divergence_are_columns_and_words_of_the_table():
    measured = by_cell(
        outcome("bone", -5, 1, 2.8, 2.0, retained=(1.0, 1.2, 1.3)),
        outcome("bone", -5, 2, 2.4, 2.2, retained=(1.0, 1.0, 1.5)),
        outcome("bone-mini", -5, 1, 9.0, diverged=True, retained=(1.0,)),
    )
    head, _, bone, mini = table(rows_of(NAMES, [1, 2], SIZES, measured)).splitlines()
    assert "| retained loss | change from the base |" in head
    assert " 1.4000 | +0.4000 |" in bone
    assert "| 10, 20 | 900 | 0.003 | 1 | diverged |  | diverged | diverged |" in mini
