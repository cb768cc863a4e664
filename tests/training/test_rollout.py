"""The probabilities by which a model in training draws are those by which it learns, with every adapter, both
generations and tuned states."""

from types import SimpleNamespace

import pytest
import torch

from families import DISTINCT, shake
from objectives.test_losses import ADAPTERS, make
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.inference.settings import Sampling
from rwkv_peft.objectives.distill import Distill
from rwkv_peft.objectives.grpo import GRPO
from rwkv_peft.rewards import Judged
from rwkv_peft.training.rollout import PromptPlan, RolloutSettings, RolloutStep, packed, sample_rollouts
from rwkv_peft.training.step.shared_prefix import share_prefixes
from rwkv_peft.training.step.steps import Whole

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
    model.tune_states()
    before = drawn(shake(model))
    assert gap(model, before) < 1e-5 and gap(model, before, share_prefixes) < 1e-5
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_state += torch.randn_like(block.att.time_state)
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


def test_an_answer_counts_with_what_ends_it():
    model = make(DISTINCT[1], dtype=torch.float32)
    answers = drawn(model)
    assert {answer.end for answer in answers} <= {"end", "length"} and any(answer.cut for answer in answers)
    for answer in answers:
        assert len(answer.tokens) == len(answer.logprobs) == len(answer.entropies)
        assert answer.cut == (len(answer.tokens) == 6 and answer.tokens[-1] != 0)
    batch = packed(answers)
    assert batch["targets"][0, batch["counted"]].tolist() == [token for answer in answers for token in answer.tokens]


def test_answers_are_judged_while_the_step_before_learns():
    events = []

    def ask(prompts, completions, rows):
        number = rows[0]
        events.append(("asked", number))
        return lambda: events.append(("judged", number)) or Judged([0.0, 1.0], {"one": [0.0, 1.0]})

    model = make(DISTINCT[1], dtype=torch.float32)
    samples = SimpleNamespace(prompt=lambda n: [n + 1], row=int, place=int, original=int)
    plan = PromptPlan(micro_bsz=1, apart=1, accumulate=1, end=3)
    step = RolloutStep(GRPO(ahead=True), SETTINGS, SimpleNamespace(submit=ask), None, 2, plan)
    for first in range(3):
        batch = step.complete_batch(model, {"samples": samples, "first": first, "tokens": torch.zeros(1, 1)})
        events.append(("learned", first))
        assert torch.equal(batch["parts"][0]["old"], batch["parts"][0]["sampled"])
    words = "asked 0, judged 0, asked 1, learned 0, judged 1, asked 2, learned 1, judged 2, learned 2"
    assert ", ".join(f"{what} {number}" for what, number in events) == words
