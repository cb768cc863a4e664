"""rwkv-peft learn by the command that a user types: what is learned and lost is measured, and no more is lost than
allowed."""

import itertools
import json

import pytest
import torch

import rwkv_peft as rp
from rwkv_peft.cli import commands
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import DataConfig
from rwkv_peft.data.feedback import Answered, FeedbackFile
from rwkv_peft.data.sources import build_samples
from rwkv_peft.evals.frontier import Likelihood, answers_in, likelihood
from rwkv_peft.tools.learn import command
from training.runs import ROOT

BASE = ROOT / "demo" / "rwkv7-demo.pth"
NAMES = ("Ann", "Ben", "Cora", "Dan", "Eva", "Fay", "Gus", "Hal")


def question(name, count):
    return [{"role": "user", "content": f"{name} has {count} red cups. What is there?"}]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads wait for each other longer than they compute, on so small a model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_thread):
    """The folder of a short run, of which one row in four validates, with feedback: eight corrections, a bad mark."""
    folder = tmp_path_factory.mktemp("learn")
    rows = [
        {"messages": [*question(name, count), {"role": "assistant", "content": f"Aye! {count} cups of {name}."}]}
        for name in NAMES
        for count in (2, 3)
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    feedback = FeedbackFile(str(folder / "feedback.jsonl"), rp.tokenizer("bytes"), 64)
    for name in NAMES:
        answered = Answered(
            question(name, 5), {"role": "assistant", "content": f"Aye! 5 cups of {name}."}, str(BASE), ""
        )
        feedback.correct(answered, "No, captain.")
    feedback.judge(answered, False)
    flags = ["--load_model", BASE, "--data_file", folder / "rows.jsonl", "--data_type", "sft", "--val_split", 0.25]
    flags += ["--tokenizer", "bytes", "--precision", "fp32", "--accelerator", "cpu", "--ctx_len", 128, "--micro_bsz", 4]
    flags += ["--bone_r", 16, "--epoch_count", 3, "--lr_init", 3e-3, "--answer_rows", 0, "--proj_dir", folder / "out"]
    assert commands.main(["train", *map(str, flags)]) == 0
    return folder


def learn(folder, *words):
    words = ["learn", folder / "out", "--feedback", folder / "feedback.jsonl", "--device", "cpu", *words]
    code = commands.main([str(word) for word in words])
    return code, json.loads((folder / "out" / "learned.json").read_text())


def test_corrections_are_learned_beside_the_runs_rows_and_the_earlier_adapter_stays(run, capsys):
    before = (run / "out" / "adapter.safetensors").read_bytes()
    code, found = learn(run, "--epoch_count", 4, "--lr_init", 3e-3, "--forget_at_most", 10)
    out = capsys.readouterr().out
    assert code == 0 and "1 row of feedback that this kind of rows does not learn from, left out" in out
    assert "6 feedback, 2 held out, 4 to keep" in out  # a fifth of eight, and the run's own validation rows
    first, *_, last = found["frontier"]
    assert (first["scale"], last["scale"], found["scale"]) == (0, 1, 1)
    for rows in ("feedback", "held out"):
        assert last[rows]["nats"] < 0.5 * first[rows]["nats"]
    assert (run / "out" / "adapter.safetensors").read_bytes() == before
    cards = [json.loads(line) for line in (run / "out" / "learned.jsonl").read_text().splitlines()]
    assert [card["of"] for card in cards] == ["feedback"] * 4 + ["held out"] * 2 + ["to keep"] * 4
    assert all(card["before"] and card["after"] for card in cards) and "4 feedback rows: " in out
    assert (run / "out" / "learned.png").read_bytes().startswith(b"\x89PNG")
    model = rp.load(BASE, [run / "out" / "adapter-learned.safetensors"], precision="fp32", device="cpu")
    assert model.tokenizer.name == "bytes"  # by the run's record beside it


def test_the_new_part_is_scaled_back_to_what_may_be_lost(run, capsys):
    words = ["--hold_out", 0, "--epoch_count", 4, "--lr_init", 5e-3, "--keep", run / "rows.jsonl"]
    words += ["--replay", run / "rows.jsonl", "--replay_share", 0]
    code, found = learn(run, *words, "--forget_at_most", 0.05)
    first, *_, last = found["frontier"]
    lost = {point["scale"]: point["to keep"]["nats"] - first["to keep"]["nats"] for point in found["frontier"]}
    assert code == 0 and lost[1] > 0.05 >= lost[found["scale"]] and 0 < found["scale"] < 1
    assert all(loss > 0.05 for scale, loss in lost.items() if scale > found["scale"])
    assert "held out" not in last and f"with {found['scale']:.0%} of the new part" in capsys.readouterr().out
    # the file that was written has the losses of its line in the table
    model = rp.load(BASE, precision="fp32", device="cpu")
    rp.add_adapter(model, load=run / "out" / "adapter-learned.safetensors")
    chosen = next(point for point in found["frontier"] if point["scale"] == found["scale"])
    samples = samples_of(run / "rows.jsonl")
    assert likelihood(model.network, None, answers_in(samples)).nats == pytest.approx(
        chosen["to keep"]["nats"], rel=1e-4
    )


def test_nothing_is_written_if_each_part_loses_too_much(run, monkeypatch, capsys):
    losses = itertools.count()
    monkeypatch.setattr(command, "likelihood", lambda model, start, answers: Likelihood(next(losses), 0.0))
    (run / "out" / "adapter-learned.safetensors").unlink(missing_ok=True)
    code, found = learn(run, "--epoch_count", 1)
    assert (code, found["scale"]) == (1, 0) and not (run / "out" / "adapter-learned.safetensors").exists()
    assert "nothing is written: each part of it loses more than --forget_at_most 0.02" in capsys.readouterr().out


def samples_of(path):
    settings = {"data_type": "sft", "tokenizer": "bytes", "ctx_len": 128, "loss_mask": "file", "dataload": "pad"}
    return build_samples(DataConfig(str(path), **settings), 257)


def test_what_cannot_be_learned_is_refused_with_its_remedy(run, tmp_path):
    (tmp_path / "bad.jsonl").write_text((run / "feedback.jsonl").read_text().splitlines()[-1])
    for words, message in (
        (["--feedback", "none.jsonl"], "--feedback none.jsonl: no such file"),
        (["--replay", "none.jsonl"], "--replay none.jsonl: no such file"),
        (["--feedback", tmp_path / "bad.jsonl"], "bad.jsonl"),
        (["--load_model", tmp_path / "none.pth"], "none.pth"),
    ):
        with pytest.raises(UserError, match=message):
            learn(run, *words)
    with pytest.raises(UserError, match="is no folder of a run that adapted a base"):
        commands.main(["learn", str(tmp_path), "--feedback", str(run / "feedback.jsonl")])
    (run / "rows.jsonl").rename(run / "moved.jsonl")
    with pytest.raises(UserError, match=r"rows of .*out cannot be replayed: .*rows.jsonl.*--replay FILE"):
        learn(run)
    (run / "moved.jsonl").rename(run / "rows.jsonl")
