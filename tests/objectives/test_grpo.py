"""The loss of each form of GRPO, its gradients and figures are those of its paper's formula in float64, an answer at a
time; an answer may have several turns, between which an environment's tokens are read."""

import math

import pytest
import torch

from families import DISTINCT, shake, shaken
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.layer import untrained
from rwkv_peft.config import AdapterConfig
from rwkv_peft.objectives.grpo import GRPO, VARIANTS
from rwkv_peft.training.rollout import Rollout, packed
from rwkv_peft.training.step.steps import Whole

G, LIMIT, VOCABULARY, STEP_TOKENS = 4, 9, 30, 50
PROMPTS = (3, 1)  # their lengths; the answers to each follow
ANSWERS = (1, 5, 9, 2, 7, 3, 3, 9)
REWARDS = torch.tensor([[1.0, 0.0, math.nan, 0.25], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
CUT = torch.tensor([False, False, True, False, False, False, False, True])


def model_of(family, trained):
    """A float64 model with an adapter, as after training if it is `trained`."""
    model = shaken(family)
    inject(model, AdapterConfig(mode="bat-in", rank=8), family=family)
    return (shake(model) if trained else model).double()


def batch_of(objective, now, turn=LIMIT):
    """A batch as a step draws it, whose answers were drawn by other probabilities than the model's `now`; behind each
    `turn` tokens of an answer come three of an environment -> [(tokens, places of the answer's)], the batch."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda size: torch.randint(VOCABULARY, (size,), generator=generator).tolist()  # noqa: E731
    prompts, rollouts = [draw(size) for size in PROMPTS], []
    for place, size in enumerate(ANSWERS):
        own = [one for at in range(size) for one in ([False] * 3 if at and at % turn == 0 else []) + [True]]
        drawn = Rollout(prompts[place // G], draw(len(own)), [0.0] * size, [0.0] * size, "", "stop", sampled=own)
        rollouts.append(drawn)
    rows = [
        (torch.tensor([*each.prompt, *each.tokens]), len(each.prompt) + torch.tensor(each.sampled).nonzero()[:, 0])
        for each in rollouts
    ]
    drawn = torch.cat(now(rows)).detach() + torch.randn(sum(ANSWERS), generator=generator, dtype=torch.float64) * 0.2
    return rows, packed(rollouts) | {
        "old": drawn,
        "sampled": drawn + 0.01,
        "advantages": objective.advantages(REWARDS).flatten(),
        "shares": 1.0 - (CUT & objective.mask_truncated).double(),
        "prompts": torch.tensor(2.0),
        "limit": torch.tensor(float(LIMIT)),
        "mean_length": torch.tensor(STEP_TOKENS / (3 * G)),  # of a step of three prompts
    }


def spoken(model, temperature=1.0):
    """rows -> the log-probabilities of the tokens of each answer."""

    def of(rows):
        for row, own in rows:
            found = (model(row[None, :-1])[0][0] / temperature).log_softmax(-1)
            yield found[own - 1, row[own]]

    return lambda rows: list(of(rows))


def entropies(model, rows, temperature):
    """The entropies of the next token at the tokens of each answer."""
    for row, own in rows:
        p = (model(row[None, :-1])[0][0] / temperature).softmax(-1)[own - 1]
        yield -(p * p.log()).sum(1)


def formula(form, one, now, old, base, undecided, advantages, counts):
    """The loss of a step by the papers, from the log-probabilities of each answer's tokens, and from entropies."""
    low, high = one.bounds
    total = 0.0
    for p, q, b, H, A, counted in zip(now, old, base, undecided, advantages, counts):
        if not counted:
            continue
        ratio = torch.exp(p - q)
        if form == "gspo":
            ratio = torch.exp((p - q).mean())
        if form == "rloo":
            ratio = torch.exp((p - q).sum())
        gain = torch.min(ratio * A, ratio.clamp(low, high) * A)
        added = one.kl_beta * (torch.exp(b - p) - (b - p) - 1) - one.entropy_bonus * H
        if form == "grpo":
            total += (-gain + added).mean() / (3 * G)
        if form == "dr_grpo":
            total += (-gain + added).sum() / LIMIT / (3 * G)
        if form == "dapo":
            total += (-gain + added).sum() / STEP_TOKENS
        if form == "gspo":
            total += (-gain + added.mean()) / (3 * G)
        if form == "rloo":
            total += (-gain + added.sum()) / (3 * G)
    return total


def naive_advantages(form):
    for group in REWARDS.tolist():
        known = [reward for reward in group if not math.isnan(reward)]
        for reward in group:
            if math.isnan(reward):
                yield 0.0
            elif form == "rloo":
                yield reward - (sum(known) - reward) / (len(known) - 1)
            else:
                mean = sum(known) / len(known)
                std = math.sqrt(sum((other - mean) ** 2 for other in known) / (len(known) - 1))
                yield (reward - mean) / (1 if form == "dr_grpo" else std + 1e-4)


@pytest.mark.parametrize("masked, bonus, turn", [(False, 0.0, LIMIT), (True, 0.2, 2)])
@pytest.mark.parametrize("form", VARIANTS)
@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_loss_and_gradients_are_the_papers(family, form, masked, bonus, turn):
    bounds = {"clip_low": 0.1, "clip_high": 0.15}
    one = GRPO(form, draw_temperature=1.5, kl_beta=0.3, entropy_bonus=bonus, mask_truncated=masked, **bounds)
    model = model_of(family, trained=True)
    now = spoken(model, 1.5)
    rows, batch = batch_of(one, now, turn)
    step = Whole(one)
    loss = step.loss(model, batch, 3.0)  # of three prompts in the step, of which two are here
    with torch.no_grad(), untrained(model):
        base = spoken(model, 1.5)(rows)
    old = batch["old"].split(ANSWERS)
    counts = [not (masked and cut) for cut in CUT.tolist()]
    undecided = list(entropies(model, rows, 1.5))
    expected = formula(form, one, now(rows), old, base, undecided, list(naive_advantages(form)), counts)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-9)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for ours, theirs in zip(*(torch.autograd.grad(each, trained, allow_unused=True) for each in (loss, expected))):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    share = 2 / 3 / len(ANSWERS)  # of an answer in a mean over the prompts of the step
    assert step.measures["gap"].item() == pytest.approx(0.01 * 2 / 3, rel=1e-5)
    distances = [(torch.exp(b - p) - (b - p) - 1).mean() for p, b in zip(now(rows), base)]
    assert step.measures["kl"].item() == pytest.approx(sum(distances).item() * share, rel=1e-6)
    assert 0 < step.measures["clipped"] < 2 / 3


@pytest.mark.parametrize("form", VARIANTS)
def test_the_first_pass_has_a_ratio_of_1(form):
    """Its gradient is that of advantage times log-probability, whatever the bounds are."""
    one, model = GRPO(form, clip_low=0.0, clip_high=0.0), model_of(DISTINCT[1], trained=False)
    _, batch = batch_of(one, spoken(model))
    del batch["old"]
    step = Whole(one)
    loss = step.loss(model, batch, 2.0)
    assert step.measures["clipped"] == 0 and "kl" not in step.measures
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


@pytest.mark.parametrize(
    "form, more, bounds",
    [
        ("grpo", {}, (0.8, 1.2)),
        ("dapo", {}, (0.8, 1.28)),
        ("gspo", {}, (1 - 3e-4, 1 + 4e-4)),
        ("dapo", {"clip_low": 0.1}, (0.9, 1.1)),
        ("grpo", {"clip_high": 0.3}, (0.8, 1.3)),
    ],
)
def test_bounds_of_the_ratio(form, more, bounds):
    assert GRPO(form, **more).bounds == pytest.approx(bounds)


def test_equal_rewards_have_no_advantage():
    for form in VARIANTS:
        assert (GRPO(form).advantages(torch.full((3, 4), 0.1)).abs() < 1e-3).all()
        assert (GRPO(form).advantages(torch.full((3, 4), math.nan)) == 0).all()
