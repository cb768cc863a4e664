"""Rollouts: a model in training samples by the probabilities by which it learns, with every adapter, both generations
and tuned states; and runs that learn from their own answers (--objective grpo, distill)."""

import json
import sys

import pytest
import torch

from families import DISTINCT, shake
from objectives.test_losses import ADAPTERS, make
from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.cli.names import STATE_PARTS
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.inference.settings import Sampling
from rwkv_peft.objectives.distill import Distill
from rwkv_peft.objectives.grpo import GRPO
from rwkv_peft.training.flags.request import parse_flags
from rwkv_peft.training.rollout import RolloutSettings, packed, sample_rollouts
from rwkv_peft.training.saving.checkpoints import CHECKPOINTS
from rwkv_peft.training.step.shared_prefix import share_prefixes
from rwkv_peft.training.step.steps import Whole
from training.runs import ROOT, finish, metrics, rewound, start

PROMPTS = {3: [5, 9, 2, 7], 4: [8], 9: [1] * 9}
SETTINGS = RolloutSettings(
    Sampling(temperature=1.3, top_p=0.95, seed=7, measured=True), 6, (), 5, BytesTokenizer(), False
)


def drawn(model, times=4):
    groups = sample_rollouts(model, SETTINGS, PROMPTS, times)
    assert model.training and [group[0].prompt for group in groups] == list(PROMPTS.values())
    return [answer for group in groups for answer in group]


def gap(model, answers, *more):
    """The mean difference between the probabilities of drawing and of learning."""
    batch, objective = packed(answers), GRPO(draw_temperature=1.3)
    batch |= {"advantages": torch.ones(len(answers)), "shares": torch.ones(len(answers)), "prompts": torch.tensor(1.0)}
    for lay in more:
        batch |= lay(batch, 4)
    step = Whole(objective)
    step.loss(model, batch, 1.0).backward()
    return step.measures["gap"].item()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_drawing_and_learning_agree(family, adapter):
    model = shake(make(family, ADAPTERS[adapter], dtype=torch.float32))
    answers = drawn(model)
    assert gap(model, answers) < 1e-5 and gap(model, answers, share_prefixes) < 1e-5
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_draws_begin_from_tuned_states(family):
    model = make(family, dtype=torch.float32)
    model.tune_states(parts=STATE_PARTS)
    before = drawn(shake(model))
    assert gap(model, before) < 1e-5 and gap(model, before, share_prefixes) < 1e-5
    with torch.no_grad():
        for block in model.blocks:
            for tuned in (block.att.shift, block.ffn.shift, block.att.time_state):
                tuned += torch.randn_like(tuned)
    assert gap(model, before) > 1e-3


@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_a_teacher_scores_each_drawn_token_alike(family):
    """The loss is the mean over the step's tokens, each with the whole prompt before it, however prompts are laid."""
    model, teacher = (shake(make(family, width=width)) for width in (16, 24))
    rows = drawn(model)
    sizes = [len(answer.tokens) for answer in rows]
    total = 2 * sum(sizes)  # as if another micro batch drew as much
    expected = 0.0
    for answer, size in zip(rows, sizes):
        tokens = torch.tensor([answer.prompt + answer.tokens])
        p, q = (one(tokens[:, :-1])[0][0, -size:].log_softmax(-1) for one in (model, teacher))
        expected = expected + (p.exp() * (p - q)).sum() / total
    numbers = {"shares": torch.ones(len(rows)), "prompts": torch.tensor(3.0), "mean_length": total / 2 / len(rows)}
    gradients = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for lay in (lambda batch, times: {}, share_prefixes):
        batch = packed(rows) | numbers
        step = Whole(Distill(kind="reverse"), teacher=teacher)
        found = step.loss(model, batch | lay(batch, 4), 6.0)  # prompts of the step
        torch.testing.assert_close(found, expected)
        for ours, theirs in zip(torch.autograd.grad(found, list(model.parameters()), allow_unused=True), gradients):
            if theirs is not None:  # RWKV-7's first block has parameters that it does not use
                torch.testing.assert_close(ours, theirs)


REWARDS = """
def capitals(completions, weight, **fields):
    return [w * sum(map(str.isupper, text)) / max(1, len(text)) for w, text in zip(weight, completions)]

def nothing(completions):
    return [0.0] * len(completions)

def fails(prompts, completions):
    return [1 / ("7" not in prompt) for prompt in prompts]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_state):
    folder = tmp_path_factory.mktemp("drawn")
    save_model(folder / "base.pth", tiny_state(vocab_size=257))
    rows = [{"query": f"{i}?", "weight": 2.0} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def train(folder, accelerator):
    def run(name, reward, *more, code=0):
        """Train in the folder `name` -> (stdout, stderr)."""
        flags = ["--load_model", folder / "base.pth", "--data_file", folder / "rows.jsonl", "--data_type", "prompts"]
        flags += ["--reward", reward if ":" not in reward else f"{folder}/{reward}"] if reward else []
        flags += ["--tokenizer", "bytes", "--ctx_len", 64, "--max_completion_length", 12, "--num_generations", 4]
        flags += ["--precision", "fp32", "--accelerator", accelerator, "--bone_r", 16, "--lr_init", "3e-3"]
        flags += ["--micro_bsz", 2, "--answer_rows", 0, "--proj_dir", folder / name, *more]
        return finish(start([sys.executable, str(ROOT / "train.py"), *map(str, flags)]), code)

    return run


def answers(folder, name):
    return [json.loads(line) for line in (folder / name / "answers.jsonl").read_text().splitlines()]


def test_answers_are_written_beside_their_rewards(folder, train):
    train("plain", "rewards.py:capitals", "--epoch_steps", 3, "--draw_batch", 3)
    records, lines = answers(folder, "plain"), metrics(folder, "plain")
    assert [record["step"] for record in records] == [step for step in range(3) for _ in range(8)]
    for record in records:
        text = record["completion"]
        assert record["prompt"] == f"User: {record['row']}?\n\nAssistant:" and 1 <= record["length"] <= 12
        assert record["reward"] == pytest.approx(2 * sum(map(str.isupper, text)) / max(1, len(text)))
        assert record["rewards"] == {"capitals": record["reward"]} and record["end"] in ("end", "stop", "length")
    for line in lines:
        mine = [record for record in records if record["step"] == line["step"]]
        for name in ("reward", "length"):
            assert line[name] == pytest.approx(sum(record[name] for record in mine) / 8)
        groups = [mine[:4], mine[4:]]
        for group in groups:
            assert sum(record["advantage"] for record in group) == pytest.approx(0, abs=1e-6)
        assert line["gap"] < 1e-4 and line["clipped"] == 0 and 0 < line["entropy"] < 5.6
        assert {"draw_s", "judge_s", "learn_s", "reward_std", "flat", "cut"} <= line.keys()
    assert len({record["completion"] for record in records}) > 20  # each has draws of its own


def test_drawing_does_not_depend_on_how_many_are_drawn_at_a_time(folder, train):
    """Nor on the size of micro batches, nor on how many answers are learned at a time, a part of a group or more."""
    runs = {"few": ("--draw_batch", 1), "parts": ("--micro_bsz", 1, "--accumulate_grad_batches", 2)}
    runs["within"] = ("--learn_batch", 3)
    for name, more in runs.items():
        train(name, "rewards.py:capitals", "--epoch_steps", 1, *more)
    few, *others = (answers(folder, name) for name in runs)
    for found in others:
        assert [record["completion"] for record in few] == [record["completion"] for record in found]
    for name in ("loss", "grad_norm", "reward", "gap", "gap_max"):
        expected = pytest.approx(metrics(folder, "few")[0][name], rel=1e-3, abs=1e-6)
        assert [metrics(folder, run)[0][name] for run in runs] == [expected] * 3
    lines = metrics(folder, "few")
    assert 0 < lines[0]["gap"] < lines[0]["gap_max"] < 1e-4


def test_several_steps_learn_from_the_same_answers_and_go_on_with_the_same_bits(folder, train):
    more = ["--grpo_loss", "gspo", "--num_iterations", 2, "--kl_beta", 0.01, "--epoch_steps", 4]
    more += ["--epoch_count", 2, "--lr_init", "1e-2", "--lr_schedule", "constant"]
    more += ["--temperature", 1.2, "--top_p", 0.98]
    train("several", "rewards.py:capitals", *more)
    lines = metrics(folder, "several")
    assert [line["reward"] for line in lines[::2]] == [line["reward"] for line in lines[1::2]]
    assert len({line["reward"] for line in lines}) == 4 and len(answers(folder, "several")) == 4 * 8
    assert all(line["draw_s"] == 0 for line in lines[1::2]) and all(line["clipped"] == 0 for line in lines[::2])
    assert any(line["clipped"] > 0 for line in lines[1::2]) and lines[-1]["kl"] > lines[0]["kl"] == 0
    again = rewound(folder / "several", "several-again")
    out, _ = train(again.name, "rewards.py:capitals", *more, "--resume")
    assert "resuming after step 4" in out
    assert (again / "adapter.safetensors").read_bytes() == (folder / "several" / "adapter.safetensors").read_bytes()
    assert answers(folder, again.name) == answers(folder, "several")


def test_a_teacher_scores_what_the_student_draws(folder, train, tiny_state):
    """The student comes nearer to it on its own answers, whatever the micro batches, and goes on with the same bits."""
    save_model(folder / "teacher.pth", tiny_state(vocab_size=257, n_embd=96))
    more = ["--objective", "distill", "--teacher_model", folder / "teacher.pth", "--distill_kl", "jsd"]
    more += ["--epoch_steps", 4, "--epoch_count", 2, "--val_split", 0.34, "--lr_init", "1e-2"]
    train("taught", "", *more)
    records, lines = answers(folder, "taught"), metrics(folder, "taught")
    assert len(records) == 8 * 8 and not {"reward", "advantage"} & records[0].keys()
    for line in lines:
        mine = [record["length"] for record in records if record["step"] == line["step"]]
        assert line["length"] == sum(mine) / 8 and line["loss"] == line["kl"] > 0 and "reward" not in line
    assert lines[-1]["val_kl"] == lines[-1]["val_loss"] < lines[3]["val_loss"]
    parts = ["--epoch_count", 1, "--epoch_steps", 1, "--micro_bsz", 1, "--accumulate_grad_batches", 2]
    train("taught-parts", "", *more, *parts)
    for name in ("loss", "kl", "nll", "grad_norm"):
        assert metrics(folder, "taught-parts")[0][name] == pytest.approx(lines[0][name], rel=1e-3)
    again = rewound(folder / "taught", "taught-again")
    assert "resuming after step 4" in train(again.name, "", *more, "--resume")[0]
    assert (again / "adapter.safetensors").read_bytes() == (folder / "taught" / "adapter.safetensors").read_bytes()


def test_rewards_without_spread_are_told_once(folder, train):
    out, _ = train("flat", "rewards.py:nothing", "--epoch_steps", 12)
    assert out.count("for 10 steps the answers to a prompt all earned the same (0 on average)") == 1
    assert "step 10: for 10 steps" in out and all(line["loss"] == 0 for line in metrics(folder, "flat"))


def test_a_reward_that_fails_names_the_answer_and_leaves_what_was_saved(folder, train):
    run = ("failing", "rewards.py:fails", "--epoch_steps", 6, "--save_every", 1, "--data_shuffle", 0)
    _, err = train(*run, code=2)
    assert "rewards.py:fails: answers 1 to 8 of 8 ('User: 6?" in err and "ZeroDivisionError" in err
    assert max((folder / "failing" / CHECKPOINTS).iterdir()).name == "step-00000003"
    assert len(answers(folder, "failing")) == 24
    (folder / "rewards.py").write_text(REWARDS.replace('"7"', '"none"'))
    out, _ = train(*run, "--resume")
    assert "resuming after step 3" in out and len(metrics(folder, "failing")) == 6
    assert [record["row"] for record in answers(folder, "failing")] == [row for row in range(12) for _ in range(4)]


@pytest.mark.parametrize(
    "more, words",
    [
        ("--reward_weights 1 2", "--reward_weights 1 2: there are 1 rewards"),
        ("--num_iterations 4 --save_every 6", "--save_every 6: --num_iterations 4 steps learn"),
        ("--ctx_len 256", "--max_completion_length 256 leaves nothing of --ctx_len 256 for a prompt"),
        ("--reward gsm8k gsm8k", "--reward gsm8k is given twice; give it a weight"),
    ],
)
def test_flags_that_do_not_go_together(more, words):
    given = "--load_model b.pth --data_file r.jsonl --data_type prompts --reward gsm8k"
    with pytest.raises(UserError, match=words):
        parse_flags([*given.split(), *more.split()])
