"""A run says if it can learn, before it begins, and if it has learned, after it ends: by its losses, held-out rows, and
answers to a few rows before and after."""

import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.documents import chat
from rwkv_peft.checkpoints.best import HeldOut
from rwkv_peft.config import TrainConfig
from rwkv_peft.data.preprocess import main as preprocess
from rwkv_peft.data.sources import build_samples, split_samples
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.evals.questions import RowsExam, rows_of
from rwkv_peft.objectives import OBJECTIVES
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.header import outlook
from rwkv_peft.training.learned import notes_on, on_held_out, quarters_of
from rwkv_peft.training.measuring import agreement, find_rows, quoted, read_before, unended
from rwkv_peft.training.rates import with_chosen_epochs
from rwkv_peft.training.step.plan import Plan
from training.runs import ROOT, finish, metrics, start

DEMO = str(ROOT / "demo" / "rwkv6-demo.pth")  # of 128 channels
BEST = Path("out/adapter-best.safetensors")


def rows_config(*more, data_type="sft"):
    """The settings of a run on rows, which nobody reads here."""
    rows = ("--data_file", f"{data_type}.jsonl", "--data_type", data_type, "--tokenizer", "bytes")
    method = () if "--peft" in more else ("--bone_r", "16")
    return parse_run(["--load_model", DEMO, *rows, "--ctx_len", "32", *method, *more]).config


def held_out(start, *losses, since=0):
    """The HeldOut of a run that validates every ten steps of 8 samples."""
    records = [{"step": 0, "samples": 8, "val_start": start}]
    records += [{"step": 10 * n - 1, "samples": 80 * n, "val_loss": loss} for n, loss in enumerate(losses, 1)]
    return HeldOut.of(records, since)


def losses_of(*values, name="loss"):
    return [{"step": step, name: value} for step, value in enumerate(values)]


FALLEN, SAME = losses_of(*np.linspace(4, 1, 20)), "note: the rows are answered as before training"


@pytest.mark.parametrize(
    "losses, changed, notes",
    [
        ([2.0] * 60, True, []),
        ([2.0] * 60, False, [SAME]),
        ([1.0, 2.0], None, []),
        (np.linspace(2, 1, 60), None, []),
        (np.linspace(1, 2, 60), True, ["note: the loss got no better (1.1186 to 1.8814); try another --lr_init"]),
    ],
)
def test_notes_at_the_end_follow_from_losses_and_answers_of_the_run(losses, changed, notes):
    rows = None if changed is None else SimpleNamespace(changed=changed, records=[])
    assert list(notes_on(rows_config("--lr_init", "1e-2"), losses_of(*losses), rows)) == notes


def test_the_course_of_a_measure_is_its_mean_at_first_and_at_last():
    assert quarters_of(losses_of(8, 6, 5, 5, 5, 5, 2, 1), "loss") == (7, 1.5)
    assert quarters_of([{"step": 0}, *losses_of(3)], "loss") == (3, 3)


@pytest.mark.parametrize("data_type, objective", [(kind, one) for one, o in OBJECTIVES.items() for kind in o.rows])
def test_notes_at_the_end_are_those_of_what_is_learned(data_type, objective):
    """A student stops as its teacher does, and not as the rows do."""
    more = {"grpo": ("--reward", "gsm8k"), "distill": ("--teacher_model", DEMO)}.get(objective, ())
    more += ("--max_completion_length", "8") if data_type == "prompts" else ()
    data_type = {"binidx": "sft"}.get(data_type, data_type)
    flags = rows_config("--objective", objective, *more, data_type=data_type)
    due, cut = {"text": "3", "end": "end"}, {"text": "3 and", "end": "length"}
    for changed, words in ((True, "stops as its row does yet"), (False, "are answered as before training")):
        rows = SimpleNamespace(changed=changed, records=[{"answer": due, "before": cut, "after": cut}])
        notes = list(notes_on(flags, FALLEN, rows))
        assert any(words in note for note in notes) is not (changed and objective == "distill"), notes
    assert flags.train.epochs_chosen  # one rule for all rows


@pytest.mark.parametrize("way, harmed", [((0.0, 0.3), False), ((0.1, -0.4), True)])
def test_pairs_whose_chosen_answers_become_unlikely_are_reported(way, harmed):
    records = losses_of(*np.linspace(*way, 40), name="chosen")
    notes = list(notes_on(rows_config("--objective", "dpo", data_type="pairs"), records, None))
    assert len(notes) == harmed and all("--dpo_nll 1" in note for note in notes)
    assert not list(notes_on(rows_config(), losses_of(*[-1.0] * 40, name="chosen"), None))


@pytest.mark.parametrize(
    "losses, words",
    [
        ((3.0, 1.0, 0.5, 0.3, 0.2), ""),
        ((3.0, 1.0, 0.5, 0.6, 0.62), ""),  # less than a twentieth of what it had gained
        ((3.0, 1.0, 0.5, 0.6, 0.7), f"the held-out loss rose after step 20: commands take {BEST}; --early_stop 2"),
        ((3.0, 3.0, 3.1, 3.2, 4.0), "known better before training: nothing was learned that holds for other rows"),
        ((0.9, 0.1, 0.0001, 0.0001, 0.0001), ""),
    ],
)
def test_rows_learned_by_heart_are_told_from_what_holds_for_others(losses, words):
    _, *notes = on_held_out(held_out(*losses), "loss", 1, BEST)
    assert words in "".join(notes) and len(notes) == bool(words)


def test_the_loss_before_and_after_and_the_lowest_are_reported():
    words, _ = on_held_out(held_out(3.0, 1.0, 0.5, 0.7), "loss", 1, BEST)
    assert words == "loss 3.0000 at first, 0.7000 at the end; after step 20 the best loss 0.5000"
    (words,) = on_held_out(held_out(0.0, -0.1, -0.7, -0.6), "reward", -1, BEST)
    assert words == "reward 0.0000 at first, 0.6000 at the end; after step 20 the best reward 0.7000"


def test_an_answer_stops_with_its_document_or_at_the_next_turn():
    ends = [{"text": "3", "end": end} for end in ("end", "stop", "length")]
    for due, given in product(ends[:2], ends):
        told = "{0} answered word for word (0 before training), {0} stop as the row does (0 before)"
        assert agreement([{"answer": due, "before": ends[2], "after": given}]) == told.format(int(given != ends[2]))


def test_answers_that_never_end_are_told_from_those_that_do():
    endless, ended = ({"answer": {"end": "end"}, "after": {"end": end}} for end in ("length", "end"))
    longer = {"answer": {"end": "length"}, "after": {"end": "length"}}
    assert not unended([longer]) and unended([longer, endless]) and unended([endless, endless])
    assert not unended([endless, ended]) and not unended([{"answer": {"end": "end"}}])


def test_a_terminal_finds_nothing_to_obey_in_an_answer():
    assert quoted({"text": " a\n\x1b[2Jb ü", "end": "end"}) == "a\\n\\x1b[2Jb ü"
    assert quoted({"text": "a", "end": "length"}) == "a…"
    assert quoted({"text": "b" * 200, "end": "end"}) == "b" * 100 + "…"


CHATS = [chat(f"Say {n}", f"{n}!") for n in range(9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_state):
    """Chats, as rows and as token files; the same as a stream in which every token counts; and a base."""
    folder = tmp_path_factory.mktemp("learning")
    write(folder / "chats.jsonl", CHATS)
    write(folder / "talk.jsonl", [chat("Hi", "Yo.", "Bye", "See you.")])
    write(folder / "texts.jsonl", [{"text": f"Number {n} is here. " * 3} for n in range(9)])
    for name in ("chats", "talk", "texts"):
        preprocess([str(folder / f"{name}.jsonl"), "--tokenizer", "bytes", "--output", str(folder / name)])
    torch.save(tiny_state(vocab_size=257), folder / "base.pth")
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(folder, name, *more):
    flags = ["--load_model", str(DEMO), "--data_file", str(folder / name), "--ctx_len", "32", *more]
    return parse_run([*flags, *(() if "--peft" in more else ("--bone_r", "16"))]).config


ROWS = ("--data_type", "sft", "--tokenizer", "bytes")


@pytest.mark.parametrize(
    "name, more, expected",
    [
        ("chats", (), ("pad", "file", True, 0, 6.3e-4, 6.3e-5)),
        ("chats.jsonl", ROWS, ("pad", "file", True, 0, 6.3e-4, 6.3e-5)),
        ("texts", (), ("get", "none", False, 1, 6.3e-4, 6.3e-5)),
        ("chats", ("--loss_mask", "none"), ("get", "none", False, 1, 6.3e-4, 6.3e-5)),
        ("chats", ("--dataload", "get", "--epoch_count", "3"), ("get", "file", False, 1, 6.3e-4, 6.3e-5)),
        ("chats", ("--epoch_steps", "5", "--lr_init", "1e-4"), ("pad", "file", False, 1, 1e-4, 2e-5)),
        ("chats", ("--epoch_save", "2", "--lr_final", "1e-6"), ("pad", "file", True, 2, 6.3e-4, 1e-6)),
        ("chats", ("--peft", "pissa"), ("pad", "file", True, 0, 6.3e-4, 6.3e-5)),
        ("chats", ("--peft", "none"), ("pad", "file", True, 0, 4.7e-4, 4.7e-5)),
        ("pairs.jsonl", ("--data_type", "pairs", "--tokenizer", "bytes"), ("pack", "file", True, 0, 1.9e-5, 1.9e-6)),
        ("chats", ("--peft", "none", "--train_parts", "state"), ("pad", "file", True, 0, 0.3, 0.03)),
    ],
)
def test_what_the_flags_leave_open_is_chosen_by_data_and_method(folder, name, more, expected):
    found = config(folder, name, *more)
    data, train = found.data, found.train
    assert (data.dataload, data.loss_mask, train.epochs_chosen, train.epoch_save) == expected[:4]
    assert (train.lr_init, train.lr_final) == expected[4:]


@pytest.mark.parametrize("epoch_steps, epochs", [(1, 400), (3, 134), (13, 31), (150, 3), (400, 1), (10_000, 1)])
def test_few_rows_are_read_for_as_many_steps_as_many_rows(epoch_steps, epochs):
    chosen = TrainConfig(epochs_chosen=True)
    next_token, dpo = OBJECTIVES["next_token"](), OBJECTIVES["dpo"]()
    assert with_chosen_epochs(chosen, next_token, epoch_steps, None).epoch_count == epochs
    assert with_chosen_epochs(chosen, dpo, epoch_steps, None).epoch_count == -(-200 // epoch_steps)
    assert with_chosen_epochs(TrainConfig(epoch_count=3), next_token, epoch_steps, None).epoch_count == 3
    began = {"config": {"train": {"epoch_count": 7}}}
    assert with_chosen_epochs(chosen, next_token, epoch_steps, began).epoch_count == 7
    assert with_chosen_epochs(chosen, next_token, epoch_steps, {}).epoch_count == epochs


def test_what_is_read_is_told_in_rows_and_passes(folder):
    settings = config(folder, "chats", "--micro_bsz", "2")
    samples = build_samples(settings.data, 257)
    settings = replace(settings, train=replace(settings.train, epoch_count=15))
    told = "\n".join(outlook(settings, samples, Plan(2, 5, 75, 0, 0)))
    assert told.startswith("steps     75: 9 rows, 15 epochs of 5 steps, 2 rows a step; each row is seen 16.7 times\n")
    assert "chosen: epochs for 400 steps (--epoch_count)" in told and "--epoch_save 1" in told
    assert "(--dataload pad; pack puts several into one" in told
    packed = config(folder, "chats", "--dataload", "pack", "--epoch_count", "3")
    samples = build_samples(packed.data, 257)
    told = list(outlook(packed, samples, Plan(1, len(samples), 3 * len(samples), 0, 0)))
    steps = f"{3 * len(samples)}: 9 rows, 3 epochs of {len(samples)} steps, 1 packed row a step"
    assert told[0] == f"steps     {steps}; each row is seen 3 times"
    few = f"{3 * len(samples)} steps are few to learn from: --epoch_count {-(-50 // len(samples))} has 50 or more"
    assert told[1:] == [f"          note: {few}"]
    stream = config(folder, "texts")
    samples = build_samples(stream.data, 257)
    told, _ = outlook(stream, samples, Plan(1, len(samples), len(samples), 0, 0))
    assert f"{len(samples)} windows, 1 epoch of" in told and told.endswith("each window is seen 1 time")


def test_the_last_answer_of_a_row_is_what_is_asked(folder):
    """In a chat of two answers, and in packed rows; a stream, and rows in which every token counts, have none."""
    talk = config(folder, "talk", "--ctx_len", "96").data
    exam = RowsExam(rows_of("training", build_samples(talk, 257), 4), load_tokenizer("bytes"), 8)
    assert exam.prompts == ["User: Hi\n\nAssistant: Yo.\n\nUser: Bye\n\nAssistant:"]
    assert exam.answer(0) == {"text": " See you.", "end": "end"}
    packed = build_samples(config(folder, "chats", "--dataload", "pack", "--ctx_len", "96").data, 257)
    rows = rows_of("training", packed, 2)
    assert len(rows) == 2 and all(load_tokenizer("bytes").decode(row.answer)[-1] == "!" for row in rows)
    assert rows_of("training", build_samples(config(folder, "texts").data, 257), 4) == []
    every = config(folder, "texts.jsonl", *ROWS).data
    assert rows_of("training", build_samples(every, 257), 4) == []


@pytest.mark.parametrize(
    "name, more, words",
    [
        ("chats", ("--strategy", "deepspeed_stage_3"), "with deepspeed_stage_3 no rank has a whole model"),
        ("texts", (), "the data holds no rows of a prompt and an answer"),
        ("chats", ("--dataload", "get"), "the data holds no rows of a prompt and an answer"),
        ("chats", (), "2 training rows are answered before and after training (--answer_rows); --val_split 0.1 would"),
        ("chats", ("--val_split", "0.4"), "2 training rows and 2 held-out rows are answered"),
        ("chats", ("--answer_rows", "0"), ""),
    ],
)
def test_which_rows_are_answered_or_why_none_is_told_in_a_line(folder, name, more, words):
    settings = config(folder, name, "--answer_rows", "2", *more)
    if settings.train.val_split:
        samples, held_out = split_samples(settings.data, 257, settings.train.val_split)
        measured = {"val": held_out}
    else:
        samples, measured = build_samples(settings.data, 257), {}
    exam, note = find_rows(settings, samples, measured)
    assert words in note and "\n" not in note and bool(note) == bool(words)
    assert (exam is None) == ("answered before and after training (" not in note and "held-out" not in note)


@pytest.fixture(scope="module")
def runs(folder):
    """Two runs that differ only in --answer_rows; the one with it stops after an epoch and is resumed ->
    {name: output}, and that one's records before it was resumed."""

    def train(name, *more):
        flags = ["--load_model", str(folder / "base.pth"), "--data_file", str(folder / "chats"), "--ctx_len", "32"]
        flags += ["--proj_dir", str(folder / name), "--micro_bsz", "2", "--peft", "lora", "--epoch_steps", "3"]
        flags += ["--lora_config", '{"lora_r":4,"lora_dropout":0.2}', "--lr_init", "1e-2", "--lr_schedule", "constant"]
        flags += ["--accelerator", "cpu", "--precision", "fp32", "--val_split", "0.3", *more]
        return finish(start([sys.executable, str(ROOT / "train.py"), *flags]))[0]

    begun, before = train("asked", "--epoch_count", "1", "--answer_rows", "2"), records(folder)
    resumed = train("asked", "--epoch_count", "2", "--answer_rows", "2", "--resume")
    plain = train("plain", "--epoch_count", "2", "--answer_rows", "0")
    return {"begun": begun, "resumed": resumed, "plain": plain}, before


def records(folder):
    return [json.loads(line) for line in (folder / "asked" / "rows.jsonl").read_text().splitlines()]


def test_answering_rows_leaves_no_trace_in_the_run(folder, runs):
    names = ("step", "loss", "grad_norm", "lr", "val_loss")
    asked, plain = ([[line.get(key) for key in names] for line in metrics(folder, run)] for run in ("asked", "plain"))
    assert asked == plain
    adapters = [(folder / run / "adapter.safetensors").read_bytes() for run in ("asked", "plain")]
    assert adapters[0] == adapters[1]
    assert not (folder / "plain" / "rows.jsonl").exists() and "answers  " not in runs[0]["plain"]


def test_the_answers_before_training_are_kept_for_a_run_that_goes_on(folder, runs):
    told, before = runs
    after = records(folder)
    assert [record["of"] for record in after] == ["training"] * 2 + ["held-out"] * 2
    assert [record["before"] for record in after] == [record["before"] for record in before]
    assert all(record["before"] and record["after"] for record in after)
    assert "answers   2 training rows: " in told["resumed"] and "  2 held-out rows: " in told["resumed"]
    for record in after:
        assert f"  row     {record['answer']['text'].strip()}\n" in told["resumed"]
    assert "2 training rows and 2 held-out rows are answered before and after training" in told["begun"]
    noted = "note: no answer stops as its row does yet" in told["resumed"]
    assert noted == unended(after)
    settings = json.loads((folder / "asked" / "config.json").read_text())
    assert settings["data"]["tokenizer"] == settings["vocabulary"]["name"] == "bytes"


def test_answers_before_training_that_are_lost_are_not_made_up(folder, tmp_path):
    samples = build_samples(config(folder, "chats").data, 257)
    exam = RowsExam(rows_of("training", samples, 2), load_tokenizer("bytes"), 8)
    answered = {"rows": exam.digest, "before": {"text": "a", "end": "end"}}
    assert read_before(tmp_path / "rows.jsonl", exam) == [None, None]
    for rows, known in (([answered] * 2, True), ([answered], False), ([answered, answered | {"rows": "x"}], False)):
        write(tmp_path / "rows.jsonl", rows)
        assert read_before(tmp_path / "rows.jsonl", exam) == [answered["before"] if known else None] * 2
