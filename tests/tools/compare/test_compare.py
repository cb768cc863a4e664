"""The command as a user types it: existing runs are kept, missing ones are run, and mistakes are reported first."""

import json
import re
from pathlib import Path

import pytest
import torch

from families import DISTINCT
from rwkv_peft.checkpoints.lock import alone_in
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.tools.compare import runs
from rwkv_peft.tools.compare.command import main, measure, print_sizes, usual_rates
from rwkv_peft.tools.compare.flags import method_flags, parse_flags
from rwkv_peft.tools.compare.plan import Cell, Size, rate_of
from rwkv_peft.tools.plan.memory import count
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.inputs import VALIDATION, find_samples
from tools.compare.lines import MODEL, OWN, TRAIN

pytestmark = pytest.mark.usefixtures("there")


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


def test_what_is_due_is_run_and_what_is_there_is_kept(files, capsys, warm_python):
    folder = files / "out"
    for method in ("bone", "lora"):
        for rate in (-6, -4):
            keep(folder, Cell(method, rate, 7), 99.0)
    command = [*OWN, "--output", str(folder), "--rates", "1e-3", "1e-2", "3e-3", "--jobs", "2"]
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
    assert text in told and text.count("| 0.003 | 1 |") == 2
    assert "| retained loss | change from the base |" in text and (folder / "retained.svg").is_file()
    assert (folder / "rates.png").is_file()
    flags = json.loads((folder / "runs" / "bone-0.003-7" / "config.json").read_text())
    assert flags["train"]["lr_init"] == 0.003 and flags["train"]["lr_final"] == pytest.approx(3e-4)
    runs = [folder / "runs" / f"{method}-0.003-7" for method in ("bone", "lora")]
    first = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) for run in runs]
    # fresh adapters change nothing, so that equal losses mean equal data
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-3)
    assert all("\nrate      0.003 to 0.0003\n" in (run / "log.txt").read_text() for run in runs)
    assert main([*command, "--", *train]) == 0  # and now nothing is due
    assert "due" not in (out := capsys.readouterr().out) and text in out
    with alone_in(folder), pytest.raises(UserError, match="--output .*: a run is training there"):
        main([*command, "--", *train])
    with pytest.raises(UserError, match=r"other settings \(steps: 2, and now 3\)"):
        main([*command, "--steps", "3", "--", *train])


RESULTS = ({"rate": "-6"}, {"rate": 10**9}, {"method": ["bone"]}, {"seed": 8})
DAMAGED = (
    ("result.json", b"[1]", "result.json holds no settings, but a list"),
    ("result.json", b"\xff{}", "result.json is not JSON"),
    ("result.json", b"{}", "is not the result of the run that its folder names"),
    *(("result.json", result(**odd), "is not the result of the run that its folder names") for odd in RESULTS),
    ("result.json", result(peak_mb=None), "peak_mb is None, and a number is due"),
    ("metrics.jsonl", b"", "no validation loss"),
    ("metrics.jsonl", b"\xff\n{}\n", "metrics.jsonl, line 1: not JSON"),
    ("metrics.jsonl", metrics(step=-1), "metrics.jsonl, line 1"),
    ("metrics.jsonl", metrics(tokens="32"), "tokens is '32', and a number is due"),
    ("metrics.jsonl", metrics(val_loss=[1.0]), r"val_loss is \[1.0\], and a number is due"),
    ("metrics.jsonl", metrics(retain_start="x"), "retain_start is 'x', and a number is due"),
    ("compare.json", b"[]", "compare.json holds no settings, but a list"),
)


@pytest.mark.parametrize("name, content, message", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_files_of_runs_are_told(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr("rwkv_peft.tools.compare.command.run_cells", lambda *arguments: False)
    words = [*OWN, "--output", str(tmp_path), "--rates", "1e-3", "--", *TRAIN]
    keep(tmp_path, Cell("bone", -6, 7), 1.0)
    if name == "compare.json":
        assert main(words) == 0
    path = tmp_path / name if name == "compare.json" else tmp_path / "runs" / Cell("bone", -6, 7).folder / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        main(words)


def test_settings_by_which_no_run_got_anywhere_are_forgotten(files, monkeypatch):
    def refused(*arguments):
        raise UserError("the first run ended")

    monkeypatch.setattr("rwkv_peft.tools.compare.command.run_cells", refused)
    words = [*OWN, "--output", str(files / "mistaken"), "--rates", "1e-3", "--", *TRAIN, "--data_file"]
    for data in ("absent", "data"):
        with pytest.raises(UserError, match="the first run ended"):
            main([*words, data])
    keep(files / "mistaken", Cell("bone", -6, 7), 1.0)
    with pytest.raises(UserError, match="other settings \\(train: "):
        main([*words, "absent"])


@pytest.mark.parametrize("rows", ["data", "held_out", "kept"])
def test_runs_on_other_data_have_no_place_in_the_table(files, monkeypatch, rows):
    """All files have one name and size; the validation's data and --retain_data count as well."""

    def write(first):
        for name in ("data", "held_out", "kept"):
            with ShardWriter(files / f"of-{rows}-{name}", vocab_size=80) as writer:
                for document in range(20):
                    writer.add([1 + (document + (first if name == rows else 7) * i) % 79 for i in range(30)] + [0])

    monkeypatch.setattr("rwkv_peft.tools.compare.command.run_cells", lambda *arguments: False)
    flags = {"--data_file": "data", "--val_data": "held_out", "--retain_data": "kept"}
    data = [word for flag, name in flags.items() for word in (flag, f"of-{rows}-{name}")]
    words = [*OWN, "--output", f"out-{rows}", "--rates", "1e-3", "--", *MODEL, *data]
    write(7)
    assert main(words) == 0
    keep(files / f"out-{rows}", Cell("bone", -6, 7), 1.0)
    write(7)  # the same content again is no other data
    assert main(words) == 0
    write(11)
    with pytest.raises(UserError, match="other settings \\(data: "):
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


@pytest.mark.parametrize("steps, every", [(1000, 100), (205, 21), (7, 1), (13, 2), (1, 1)])
def test_a_run_is_validated_ten_times_or_fewer(steps, every):
    assert parse_flags(["--output", "out", "--steps", str(steps), "--", *TRAIN]).val_every == every


def test_runs_of_all_seeds_validate_on_the_same_samples(files):
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


def test_what_has_no_rank_trains_what_the_model_has_of_it(files):
    comparison = parse_flags(["--output", "out2", "--methods", "bone", "full", "state", "--rank", "8", "--", *TRAIN])
    sizes, _ = measure(comparison)
    base = torch.load(files / "base.pth", mmap=True)
    assert sizes["full"] == Size(0, 0, sum(tensor.numel() for tensor in base.values()))
    assert sizes["state"] == Size(0, 0, 4 * 16 * 16)  # one layer of four heads


@pytest.mark.parametrize("parts", [(), ("ln",), ("time", "state"), ("emb", "head", "ln", "time", "state")])
@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_what_is_told_to_train_is_what_does(files, family, parts, capsys):
    """Parts of the model and its states train along with adapters."""
    shapes = family.shapes(family.new_dimensions(2, 64, 80, head_size=16))
    torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, files / f"{family.version}.pth")
    train = [*TRAIN, "--load_model", f"{family.version}.pth", *(("--train_parts", *parts) if parts else ())]
    methods = "bone", "pissa", "dora"
    sizes, base = measure(parse_flags(["--output", "out4", "--methods", *methods, "--rank", "8", "--", *train]))
    print_sizes(sizes)
    told = capsys.readouterr().out
    for method, size in sizes.items():
        request = parse_run([*train, "--proj_dir", "out4", *method_flags(method, size.rank)])
        trains = count(base.config, request.config.adapter).trains
        assert size.trained == trains
        assert f"{method:<13} {trains:>14,} trained parameters, rank {size.rank}\n" in told


@pytest.mark.parametrize(
    "channels, rates",
    [(64, [3e-4, 1e-3, 3e-3]), (128, [3e-4, 1e-3, 3e-3]), (2048, [1e-5, 3e-5, 1e-4]), (4096, [1e-5, 3e-5, 1e-4])],
)
def test_a_sweep_begins_about_the_rate_of_the_models_width(channels, rates):
    assert [rate_of(number) for number in usual_rates(channels)] == rates


def test_without_rates_those_of_the_width_are_due_and_told(files, capsys):
    folder = files / "usual"
    for method in ("bone", "lora"):
        for rate, loss in zip(usual_rates(64), (2.0, 1.0, 2.0)):
            keep(folder, Cell(method, rate, 7), loss)
    assert main([*OWN, "--output", str(folder), "--", *TRAIN]) == 0
    out = capsys.readouterr().out
    assert "learning rates to begin with: 0.0003 0.001 0.003\n" in out and "due" not in out
