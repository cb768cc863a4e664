"""The notes at the end of a run: on what its losses, held-out rows and rows before and after show that it learned."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rwkv_peft.checkpoints.best import HeldOut
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.evals.questions import Row, RowsExam
from rwkv_peft.objectives import OBJECTIVES
from rwkv_peft.tools.study.flags import parse_flags
from rwkv_peft.training.flags.request import parse_flags as parse_train_flags
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.measuring.learned import (
    blind,
    doubts,
    fall_of,
    held_out_line,
    notes_on,
    nothing_learned,
    overfitted,
    unlikely_answers,
)
from rwkv_peft.training.measuring.questions import BeforeAfter, agreement, quoted, unended
from rwkv_peft.training.step.plan import Plan
from training.runs import ROOT

DEMO = str(ROOT / "demo" / "rwkv6-demo.pth")  # of 128 channels
PLAN, BEST = Plan(8, 10, 40, 0, 0), Path("out/adapter-best.safetensors")
LONG = Plan(8, 30, 60, 0, 0)


def config(*more, data_type="sft"):
    """The settings of a run on rows, which nobody reads here."""
    rows = ("--data_file", f"{data_type}.jsonl", "--data_type", data_type, "--tokenizer", "bytes")
    method = () if "--peft" in more else ("--bone_r", "16")
    return parse_run(["--load_model", DEMO, *rows, "--ctx_len", "32", *method, *more]).config


def held_out(start, *losses, since=0):
    """The HeldOut of a run that validates every ten steps of 8 samples."""
    records = [{"step": 0, "samples": 8, "val_start": start}]
    records += [{"step": 10 * n - 1, "samples": 80 * n, "val_loss": loss} for n, loss in enumerate(losses, 1)]
    return HeldOut.of(records, since)


@pytest.mark.parametrize("seed", range(5))
def test_a_fall_of_the_loss_is_told_from_its_noise(seed):
    noise = np.random.default_rng(seed).normal(0, 0.1, 200)
    assert not fall_of(list(2 + noise)).real and not fall_of(list(2 + noise + np.linspace(0, 1, 200))).real
    assert fall_of(list(2 + noise - np.linspace(0, 0.2, 200))).real
    assert fall_of([2.0] * 7) is None and not fall_of([2.0] * 8).real


def test_too_little_to_learn_from_is_told_with_its_flag():
    few = doubts(config("--micro_bsz", "8"), Plan(8, 13, 39, 0, 0))
    told = "39 steps are few to learn from: --epoch_count 4 has 50 or more, or a smaller --micro_bsz has more steps an"
    assert few == [f"{told} epoch"]
    assert doubts(config(), Plan(8, 13, 52, 0, 0)) == []
    (low,) = doubts(config("--lr_init", "2e-5"), Plan(8, 13, 52, 0, 0))
    assert low.startswith("a rate of 2e-05 is far below 0.00063") and low.endswith("--lr_init auto takes it")
    assert "far above 0.00063" in doubts(config("--lr_init", "0.1"), Plan(8, 13, 52, 0, 0))[0]
    lora = config("--peft", "lora", "--lora_config", '{"lora_r":8}', "--lr_init", "6.3e-4")
    (low,) = doubts(lora, Plan(8, 13, 52, 0, 0))
    assert "far below 0.0043, that of lora" in low


@pytest.mark.parametrize(
    "losses, changed, words",
    [
        ([2.0] * 60, False, "loss did not fall by more than its noise (2.0000 to 2.0000) and the rows are answered"),
        ([2.0] * 60, None, "(2.0000 to 2.0000). A rate of 2e-05 is far below 0.00063"),
        ([2.0], False, "the rows are answered as before training. A rate of 2e-05 is far below"),
        ([2.0] * 60, True, ""),
        (list(np.linspace(2, 1, 60)), False, ""),
        ([2.0], None, ""),
    ],
)
def test_a_run_that_learned_nothing_says_so(losses, changed, words):
    note = nothing_learned(config("--lr_init", "2e-5"), LONG, losses, changed)
    assert words in note and bool(note) == bool(words)
    enough = nothing_learned(config(), LONG, losses, changed)
    worse = nothing_learned(config(), LONG, list(np.linspace(1, 2, 60)), changed)
    assert "made the model worse: the loss rose (1.1186 to 1.8814). Try a lower rate: --lr_init 0.0002" in worse
    assert ("The rate may be too low: try --lr_init 0.002" in enough) == bool(words)
    fast = nothing_learned(config("--lr_init", "1e-2"), LONG, losses, changed)
    assert ("The rate may be too high: --lr_init auto takes 0.00063" in fast) == bool(words)


@pytest.mark.parametrize("data_type, objective", [(kind, one) for one, o in OBJECTIVES.items() for kind in o.rows])
def test_notes_at_the_end_are_those_of_what_is_learned(data_type, objective):
    """A loss of preferences falls without a change of any answer; who has a teacher stops as it does."""
    more = {"grpo": ("--reward", "gsm8k"), "distill": ("--teacher_model", DEMO)}.get(objective, ())
    more += ("--max_completion_length", "8") if data_type == "prompts" else ()
    data_type = {"binidx": "sft"}.get(data_type, data_type)
    flags = config("--objective", objective, *more, data_type=data_type)
    due, cut = {"text": "3", "end": "end"}, {"text": "3 and", "end": "length"}
    for changed, words in ((True, "stops as its row does yet"), (False, "are answered as before training")):
        rows = SimpleNamespace(changed=changed, known=False, records=[{"answer": due, "before": cut, "after": cut}])
        notes = notes_on(flags, LONG, list(np.linspace(4, 1, 60)), [], rows)
        expected = objective != "distill" if changed else data_type in ("pairs", "labels")
        assert any(words in note for note in notes) is expected, notes
    assert flags.train.epochs_chosen  # one rule for all rows


def test_rows_that_the_base_knew_are_no_mistake_of_the_run():
    flags, plan = config(), Plan(8, 30, 60, 0, 0)
    for known, losses in ((True, [2.0] * 60), (False, [0.01] * 60)):
        assert "the base knew these rows already" in nothing_learned(flags, plan, losses, False, known)


@pytest.mark.parametrize(
    "objective, name, way, harmed",
    [
        ("dpo", "chosen", (0.0, 0.3), False),
        ("dpo", "chosen", (0.1, -0.4), True),
        ("simpo", "nll", (0.2, 0.6), True),
        ("orpo", "nll", (0.2, 0.1), False),
    ],
)
def test_pairs_whose_chosen_answers_become_unlikely_are_told(objective, name, way, harmed):
    records = [{"step": n, name: value} for n, value in enumerate(np.linspace(*way, 40))]
    note = unlikely_answers(config("--objective", objective, data_type="pairs"), records)
    assert bool(note) == harmed and ("--dpo_nll 1" in note) == harmed
    assert unlikely_answers(config(), [{"step": 0, "chosen": -1.0}] * 40) == ""


@pytest.mark.parametrize(
    "losses, words",
    [
        ((3.0, 1.0, 0.5, 0.3, 0.2), ""),
        ((3.0, 1.0, 0.5, 0.6, 0.62), ""),  # less than a twentieth of what it had gained
        ((3.0, 1.0, 0.5, 0.6, 0.7), "after step 20 the run learned its own rows by heart"),
        ((3.0, 1.0, 0.5, 0.6, 0.7), f"take {BEST} of this folder. What ends sooner: --epoch_count 2, or --early_"),
        ((3.0, 3.0, 3.1, 3.2, 4.0), "known better before training (3.0000, and 3.0000 at best): this run learned"),
        ((0.02, 0.021, 0.03), "(0.0200, and 0.0210 at best): the base has learned such rows already"),
        ((3.0, 3.2, 3.1, 3.2, 4.0), "or the rate too high: try --lr_init 0.0002"),
        ((0.9, 0.1, 0.0001, 0.0001, 0.0001), ""),
    ],
)
def test_rows_learned_by_heart_are_told_from_what_holds_for_others(losses, words):
    note = overfitted(held_out(*losses), PLAN, BEST, 6e-4)
    assert words in note and bool(note) == bool(words)


def test_the_loss_before_and_after_and_the_lowest_are_told():
    words = held_out_line(held_out(3.0, 1.0, 0.5, 0.7), "loss", 1)
    assert words == "loss 3.0000 before training, 0.7000 at the end; after step 20 the lowest loss 0.5000"
    words = held_out_line(held_out(0.0, -0.1, -0.7), "reward", -1)
    assert words == "reward 0.0000 before training, 0.7000 at the end; after step 20 the highest reward 0.7000"


@pytest.mark.parametrize(
    "gains, is_blind",
    [([1.0, 0.5, 2.0, 0.1, 0.8, 1.2, 0.4, 0.9], False), ([0.5, -0.5, 0.2, -0.1] * 2, True), ([0.0] * 7, False)],
)
def test_answers_that_do_not_depend_on_their_questions_are_told(gains, is_blind):
    note = blind([(1.0, 1.0 + gain) for gain in gains])
    assert bool(note) == is_blind and ("learned how answers look, and not what they say" in note) == is_blind


def test_losses_on_other_rows_do_not_count():
    found = held_out(3.0, 1.0, 0.5, 0.9, 0.8, since=160)
    assert found.start is None and found.losses == [(30, 0.9), (40, 0.8)] and overfitted(found, PLAN, BEST, 6e-4) == ""
    assert held_out_line(found, "loss", 1) == "loss 0.8000 at the end; after step 40 the lowest loss 0.8000"


def test_an_answer_is_right_by_its_words_and_its_end():
    due = {"text": " 3!", "end": "end"}
    records = [
        {"answer": due, "before": {"text": "4", "end": "end"}, "after": {"text": "3!", "end": "end"}},
        {"answer": due, "before": {"text": "4", "end": "length"}, "after": {"text": "3!", "end": "length"}},
    ]
    told = "1 answered word for word (0 before training), 1 stop as the row does (1 before)"
    assert agreement(records) == told
    long = {"text": "3 and so on", "end": "length"}
    told = "1 answered word for word (0 before training), 1 is longer than the 64 tokens that are compared"
    assert agreement([{"answer": long, "before": due, "after": long}]) == told
    for before, known in (({"text": " 3!", "end": "end"}, True), ({"text": " 4", "end": "end"}, False), (None, False)):
        rows = SimpleNamespace(records=[{"answer": due, "before": due}, {"answer": due, "before": before}])
        assert BeforeAfter.known.fget(rows) is known


def test_an_answer_stops_with_its_document_or_at_the_next_turn():
    ends = [{"text": "3", "end": end} for end in ("end", "stop", "length")]
    for due, given in product(ends[:2], ends):
        told = "{0} answered word for word (0 before training), {0} stop as the row does (0 before)"
        assert agreement([{"answer": due, "before": ends[2], "after": given}]) == told.format(int(given != ends[2]))


def test_texts_that_end_an_answer_end_those_of_rows(tmp_path):
    """As study's --stop does, for layouts that are no chat."""
    bytes_ = load_tokenizer("bytes")
    row = Row("training", tuple(bytes_.encode("Q: a\nA:")), (*bytes_.encode(" 3\n"), 0))
    for stops, due in (((), {"text": " 3\n", "end": "end"}), (("\n",), {"text": " 3", "end": "stop"})):
        exam = RowsExam([row], bytes_, 1, stops)
        assert exam.answer(0) == due and exam.stops == [stops]
    flags = parse_flags(["t.txt", "--load_model", "b.pth", "--output", str(tmp_path), "--stop", r"\n", "END"])
    assert parse_train_flags(flags.words).train.eval_stop == (r"\n", "END")


def test_answers_that_never_end_are_told_from_those_that_do():
    endless, ended = ({"answer": {"end": "end"}, "after": {"end": end}} for end in ("length", "end"))
    longer = {"answer": {"end": "length"}, "after": {"end": "length"}}
    assert not unended([longer]) and unended([longer, endless]) and unended([endless, endless])
    assert not unended([endless, ended]) and not unended([{"answer": {"end": "end"}}])


def test_a_terminal_finds_nothing_to_obey_in_an_answer():
    assert quoted({"text": " a\n\x1b[2Jb ü", "end": "end"}) == "a\\n\\x1b[2Jb ü"
    assert quoted({"text": "a", "end": "length"}) == "a…"
    assert quoted({"text": "b" * 200, "end": "end"}) == "b" * 100 + "…"
