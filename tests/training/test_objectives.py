"""--objective: each entry of the table learns by the command that a user types, goes on with the same bits, and
computes the same on two ranks, under ZeRO stage 2, with --grad_cp and more and smaller micro batches."""

import json
import shutil
import sys

import pytest

from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config.objective import REWARDS, TEACHER
from rwkv_peft.objectives import OBJECTIVES
from rwkv_peft.training.flags.request import parse_flags
from training.runs import ROOT, finish, metrics, rewound, start_ranks

CAPITALS = """
def capitals(completions):
    return [sum(map(str.isupper, text)) / max(1, len(text)) for text in completions]
"""
NUMBER, STEPS = 40, 16  # rows, of which 32 are trained on, and steps: 2 epochs of 4 rows each


def row(data_type, i):
    """Whatever the question, the answer in capital letters is the better one."""
    good, bad = "YES" * (1 + i % 3), "no" * (1 + i % 4)
    answers = {
        "sft": {"response": good},
        "pairs": {"chosen": good, "rejected": bad},
        "labels": {"response": (bad, good)[i % 2], "label": i % 2 == 1},
        "prompts": {},
    }
    return {"query": f"{i}?"} | answers[data_type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_state):
    folder = tmp_path_factory.mktemp("objectives")
    save_model(folder / "base.pth", tiny_state(vocab_size=257))
    (folder / "reward.py").write_text(CAPITALS)
    save_model(folder / "teacher.pth", tiny_state(vocab_size=257, n_embd=96))
    for data_type in ("sft", "pairs", "labels", "prompts"):
        rows = (row(data_type, i) for i in range(NUMBER))
        (folder / f"{data_type}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def train(folder, accelerator):
    def run(objective, name, *more):
        """Train by an objective in the folder `name` -> what the first rank printed."""
        data_type = OBJECTIVES[objective].rows[-1]
        flags = ["--load_model", folder / "base.pth", "--data_file", folder / f"{data_type}.jsonl", "--bone_r", 16]
        flags += ["--data_type", data_type, "--objective", objective, "--tokenizer", "bytes", "--ctx_len", 64]
        if objective == "grpo":
            flags += ["--reward", f"{folder / 'reward.py'}:capitals", "--max_completion_length", 12]
        flags += ["--lr_init", "3e-3", "--lr_schedule", "constant", "--accumulate_grad_batches", 1, "--val_split", 0.2]
        flags += ["--precision", "fp32", "--accelerator", accelerator, "--epoch_count", 2, "--answer_rows", 0]
        flags += ["--epoch_save", 1, "--data_shuffle", 0, "--proj_dir", folder / name, *more]
        if TEACHER in OBJECTIVES[objective].needs:
            flags += ["--teacher_model", folder / "teacher.pth"]
        ranks = start_ranks([sys.executable, str(ROOT / "train.py"), *map(str, flags)])
        return [finish(rank) for rank in ranks][0][0]

    return run


@pytest.fixture(scope="module", params=OBJECTIVES)
def learned(request, train):
    """(an objective's name, what its run printed); the run is in the folder of that name."""
    return request.param, train(request.param, request.param, "--micro_bsz", 4)


def test_a_run_learns_which_answer_is_better(folder, learned):
    name, out = learned
    objective, (first, *_, last) = OBJECTIVES[name], metrics(folder, name)
    given = {"reward": (f"{folder / 'reward.py'}:capitals",)} if REWARDS in objective.needs else {}
    words = objective(**given).describe()
    assert (f"objective {words}\n" in out) if words else "\nobjective " not in out
    figures = {figure.name for figure in objective.figures}
    measured = {"reward"} if REWARDS in objective.needs else figures  # of drawn answers, held-out ones
    assert figures <= first.keys() and {f"val_{figure}" for figure in measured} <= last.keys()
    assert ("val_ppl" in last) == (not figures)
    assert last["step"] == STEPS - 1 and last["val_loss"] < first["loss"]
    if "reward" in figures:
        assert last["val_reward"] == -last["val_loss"] > 1.5 * first["reward"]
    if "margin" in figures:
        assert last["val_accuracy"] > 0.8 and last["val_margin"] > max(0.1, first["margin"])
        assert "accuracy 1.00, lr" in out and f"margin {last['val_margin']:.3f}" in out


def test_a_run_goes_on_with_the_same_bits(folder, learned, train):
    """One objective for each kind of rows."""
    name, _ = learned
    if name not in ("next_token", "dpo", "kto", "grpo"):
        return
    rewound(folder / name, f"{name}-parts")
    out = train(name, f"{name}-parts", "--micro_bsz", 4, "--resume")
    assert f"resuming after step {STEPS // 2}" in out
    adapters = [(folder / one / "adapter.safetensors").read_bytes() for one in (name, f"{name}-parts")]
    assert adapters[0] == adapters[1]
    lines = [
        [{key: value for key, value in line.items() if not key.endswith("_s")} for line in metrics(folder, one)]
        for one in (name, f"{name}-parts")
    ]
    assert lines[0] == lines[1]


def test_ranks_micro_batches_stages_and_checkpointed_blocks_compute_the_same(folder, learned, train):
    name, _ = learned
    spread = ("--micro_bsz", 1, "--accumulate_grad_batches", 2, "--devices", 2, "--strategy", "deepspeed_stage_2")
    spread += ("--grad_cp", 1, "--epoch_count", 1, "--epoch_steps", 3)
    train(name, f"{name}-spread", *spread)
    same(name, *(metrics(folder, run) for run in (f"{name}-spread", name)))


def same(name, ours, theirs, rel=1e-3):
    """Require of an objective's lines of metrics that they tell the same."""
    for line, expected in zip(ours, theirs):
        for number in ("loss", "grad_norm", *(figure.name for figure in OBJECTIVES[name].figures)):
            assert line[number] == pytest.approx(expected[number], rel=rel, abs=1e-5), (line["step"], number)


def test_a_step_near_the_base_shows_how_far_it_is(folder, train):
    """Validation has the cross-entropy alone; a run goes on to the bit, and ranks that gather weights find the same."""
    near = ("--kl_to_base", 0.3, "--dataload", "pack", "--ctx_len", 32, "--epoch_count", 4)
    out = train("next_token", "near", "--micro_bsz", 2, *near)
    assert "objective the next token's loss, and 0.3 times KL(base | model)\n" in out and ", kl " in out
    first, *_, last = lines = metrics(folder, "near")
    assert first["kl"] == 0 < last["kl"] and "val_ppl" in last and "val_kl" not in last
    for line in lines:
        assert line["loss"] == pytest.approx(line["nll"] + 0.3 * line["kl"], rel=1e-5)
    rewound(folder / "near", "near-parts")
    train("next_token", "near-parts", "--micro_bsz", 2, *near, "--resume")
    adapters = [(folder / one / "adapter.safetensors").read_bytes() for one in ("near", "near-parts")]
    assert adapters[0] == adapters[1]
    spread = ("--micro_bsz", 1, "--devices", 2, "--strategy", "deepspeed_stage_3", "--grad_cp", 1)
    train("next_token", "near-spread", *spread, *near)
    for line, expected in zip(metrics(folder, "near-spread"), lines, strict=True):
        for number in ("loss", "kl", "nll", "grad_norm"):
            assert line[number] == pytest.approx(expected[number], rel=1e-3, abs=1e-5), (line["step"], number)


def test_prompts_are_computed_once(folder, learned, train):
    """Losses are those of whole rows."""
    if learned[0] != "dpo":
        return
    assert "a prompt is computed once for both answers, which saves" in learned[1]
    out = train("dpo", "dpo-whole", "--micro_bsz", 4, "--share_prompts", 0)
    assert "a prompt is computed once" not in out
    same("dpo", metrics(folder, "dpo-whole"), metrics(folder, "dpo"), rel=1e-4)


def test_another_objective_does_not_go_on(folder, learned, train):
    name, _ = learned
    if name != "dpo":
        return
    shutil.copytree(folder / name, folder / "other")
    with pytest.raises(AssertionError, match="has objective dpo, this command simpo"):
        train("simpo", "other", "--micro_bsz", 4, "--resume", "auto")


def flags(data_type, *more):
    return ["--load_model", "base.pth", "--data_file", "rows.jsonl", "--data_type", data_type, *more]


@pytest.mark.parametrize(
    "data_type, name", [("binidx", "next_token"), ("sft", "next_token"), ("pairs", "dpo"), ("labels", "kto")]
)
def test_the_data_has_a_default_objective(data_type, name):
    assert parse_flags(flags(data_type)).objective == OBJECTIVES[name]()


@pytest.mark.parametrize(
    "data_type, name, words",
    [
        ("sft", "dpo", "--objective dpo learns from --data_type pairs, and the data is sft; .* --objective next_token"),
        ("pairs", "next_token", "from --data_type binidx or sft, .* pairs; .* --objective dpo or ipo or simpo or orpo"),
        ("pairs", "kto", "--objective kto learns from --data_type labels, and the data is pairs"),
    ],
)
def test_data_that_an_objective_does_not_learn_from_is_refused(data_type, name, words):
    with pytest.raises(UserError, match=words):
        parse_flags(flags(data_type, "--objective", name))


@pytest.mark.parametrize("flag", ["--train_type", "--data_type"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_found_by_their_names(flag, name):
    with pytest.raises(UserError, match=f"--data_type {OBJECTIVES[name].rows[-1]} --objective {name}"):
        parse_flags(["--load_model", "base.pth", "--data_file", "rows.jsonl", flag, name])
