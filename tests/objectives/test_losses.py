"""Each objective's loss, gradients and figures are those of its paper's formula in float64, a document at a time."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from families import DISTINCT, shake, shaken
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.layer import untrained
from rwkv_peft.adapters.methods import METHODS, words_of
from rwkv_peft.config import AdapterConfig
from rwkv_peft.config.objective import TEACHER
from rwkv_peft.data.binidx import UNDESIRABLE
from rwkv_peft.data.samples import collate
from rwkv_peft.objectives import OBJECTIVES
from rwkv_peft.objectives.distill import Distill
from rwkv_peft.objectives.documents import log_probabilities
from rwkv_peft.objectives.dpo import DPO
from rwkv_peft.objectives.ipo import IPO
from rwkv_peft.objectives.kto import KTO
from rwkv_peft.objectives.next_token import NextToken
from rwkv_peft.objectives.orpo import ORPO
from rwkv_peft.objectives.simpo import SimPO
from rwkv_peft.training.step.steps import Whole, plain_forward

KL = 0.3  # of the step before

# The papers' formulas. now and base hold, for each row, the log-probabilities of the tokens of its two answers; of an
# objective with a teacher, base holds the teacher's, and both have the columns of with_all. Each formula gives (the
# loss, its figures in the order of the objective's) of each row.


def next_token(one, now, base, labels):
    tokens = torch.cat([answer for row in now for answer in row])
    return [(-token,) for token in tokens]


def dpo(one, now, base, labels):
    for (chosen, rejected), (chosen_before, rejected_before) in zip(now, base):
        gain = chosen.sum() - chosen_before.sum()
        margin = one.beta * (gain - (rejected.sum() - rejected_before.sum()))
        loss = -torch.log(1 / (1 + torch.exp(-margin))) - one.nll * chosen.mean()
        yield loss, margin > 0, margin, one.beta * gain


def ipo(one, now, base, labels):
    for (chosen, rejected), (chosen_before, rejected_before) in zip(now, base):
        gain = (chosen - chosen_before).mean()
        margin = gain - (rejected - rejected_before).mean()
        yield (margin - 1 / (2 * one.beta)) ** 2, margin > 0, margin, gain


def simpo(one, now, base, labels):
    for chosen, rejected in now:
        margin = one.beta / len(chosen) * chosen.sum() - one.beta / len(rejected) * rejected.sum()
        yield -torch.log(1 / (1 + torch.exp(-(margin - one.gamma)))), margin > 0, margin, -chosen.mean()


def orpo(one, now, base, labels):
    for row in now:
        chosen, rejected = (answer.mean().exp() for answer in row)
        ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
        loss = -torch.log(1 / (1 + torch.exp(-torch.log(ratio))))
        yield -row[0].mean() + one.weight * loss, ratio > 1, torch.log(ratio), -row[0].mean()


def kto(one, now, base, labels):
    gains = [[a.sum() - b.sum() for a, b in zip(*rows)] for rows in zip(now, base)]
    for (gain, mismatched), label in zip(gains, labels):
        margin = one.beta * (gain - KL) if label else one.beta * (KL - gain)
        weight = one.desirable if label else one.undesirable
        yield weight * (1 - torch.sigmoid(margin)), margin > 0, margin, mismatched


def distill(one, now, base, labels):
    ours, theirs = (torch.cat([answer for row in rows for answer in row]) for rows in (now, base))
    p, q = ((every[:, 1:] / one.temperature).softmax(1) for every in (ours, theirs))
    m = one.beta * q + (1 - one.beta) * p
    apart = one.beta * (q * (q / m).log()).sum(1) + (1 - one.beta) * (p * (p / m).log()).sum(1)
    apart = one.temperature**2 * apart
    return [(each, each, -token) for each, token in zip(apart, ours[:, 0])]


FORMULAS = {
    "next_token": (NextToken(), next_token),
    "dpo": (DPO(0.7, 0.3), dpo),
    "ipo": (IPO(0.7), ipo),
    "simpo": (SimPO(1.7, 0.4), simpo),
    "orpo": (ORPO(0.6), orpo),
    "kto": (KTO(0.7, 1.3, 0.8), kto),
    "distill": (Distill("teacher.pth", kind="jsd", beta=0.3, temperature=1.7), distill),
}
VOCABULARY = 30
OWN = {"pissa": {"svd_niter": 0}, "lora": {"alpha": 16.0}}
ADAPTERS = {
    name: AdapterConfig(**words_of(method), rank=8, mini_rank=4, **OWN.get(name, {}))
    for name, method in METHODS.items()
    if name != "lora-ga"  # which starts from a gradient
}
LENGTHS = [7, 4, 3, 11, 6, 2, -1, -1]  # of documents, two a row; below 0: nothing counts, as in what fills up a batch
LABELS = (True, False, True, True)


def make(family, adapter=None, dtype=torch.float64, width=16):
    model = shaken(family, n_embd=width, vocab_size=VOCABULARY)
    if adapter is not None:
        inject(model, adapter, family=family)
    return model.to(dtype)


def documents(lengths, labels=None):
    """Documents with so many targets, whose last half counts; no target counts if a length is negative. Masks tell
    labels, if they are given."""
    generator = torch.Generator().manual_seed(1)
    for place, length in enumerate(lengths):
        tokens = torch.randint(VOCABULARY, (abs(length) + 1,), generator=generator)
        mask = (torch.arange(abs(length)) >= abs(length) // 2) & (length > 0)
        yield tokens, mask if labels is None else mask.to(torch.uint8) * (1 if labels[place // 2] else UNDESIRABLE)


def answer(model, tokens, mask):
    """The log-probabilities of a document's counted tokens."""
    log_probabilities = model(tokens[None, :-1])[0][0].log_softmax(-1)
    return log_probabilities.gather(1, tokens[1:, None])[:, 0][mask != 0]


def with_all(model, tokens, mask):
    """The log-probabilities of a document's counted tokens (n, 1), and beside them those of all tokens (n, V)."""
    every = model(tokens[None, :-1])[0][0].log_softmax(-1)
    return torch.cat([every.gather(1, tokens[1:, None]), every], 1)[mask != 0]


def test_every_objective_has_its_formula():
    """grpo has those of its forms in test_grpo.py."""
    assert FORMULAS.keys() == OBJECTIVES.keys() - {"grpo"}


def naive(name, model, base, lengths, count):
    """(loss, *figures) of a batch by an objective's formula."""
    one, formula = FORMULAS[name]
    pairs = list(documents(lengths))
    rows = [pair for pair in zip(pairs[::2], pairs[1::2]) if pair[0][1].any()]
    read = with_all if TEACHER in one.needs else answer
    now, before = ([[read(m, *document) for document in row] for row in rows] for m in (model, base))
    before = [[values.detach() for values in row] for row in before]
    columns = zip(*formula(one, now, before, LABELS))
    return [sum(value.double() for value in column) / count for column in columns]


def batch_of(name, lengths=LENGTHS):
    """A batch of packed rows, or of padded ones for an objective of tokens."""
    one, _ = FORMULAS[name]
    if one.unit == "token":
        return collate(list(documents(lengths)))
    return collate([list(documents(lengths, LABELS if "labels" in one.rows else None))])


def other_model(family):
    """A teacher: wider, and of another generation."""
    return shake(make(next(other for other in DISTINCT if other is not family), width=24))


def compare(name, family, adapter):
    model, base = shake(make(family, adapter)), make(family)
    one, batch = FORMULAS[name][0], batch_of(name)
    if TEACHER in one.needs:
        base = other_model(family)
    step = Whole(one, teacher=base)
    step.figures = {"kl": KL}
    found, expected = step.loss(model, batch, 2.0), naive(name, model, base, LENGTHS, 2.0)
    assert tuple(step.measures) == tuple(figure.name for figure in one.figures)
    measured = torch.stack([found, *step.measures.values()])
    torch.testing.assert_close(measured, torch.stack(expected), rtol=1e-6, atol=1e-8, check_dtype=False)
    torch.testing.assert_close(step.total(model, batch), step.loss(model, batch, 1), rtol=0, atol=0)
    if one.of_tokens:  # its gradient, in which L2Wrap has a part, is held by test_cross_entropy.py
        return step, batch
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = (torch.autograd.grad(loss, trained, allow_unused=True) for loss in (found, expected[0]))
    for ours, theirs in zip(*gradients):
        if theirs is None:  # RWKV-7's first block has parameters that it does not use
            assert ours is None
            continue
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # pissa's base is rounded
    return step, batch


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_loss_gradients_and_figures_are_the_papers(family, name):
    step, batch = compare(name, family, ADAPTERS["bat-in"])
    counted = sum(length - length // 2 for length in LENGTHS if length > 0)
    assert step.items(batch) == (counted if step.objective.unit == "token" else 3)


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "bat-in"])
@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_every_method_is_asked_for_the_bases_word(family, adapter):
    compare("dpo", family, ADAPTERS[adapter])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_a_step_near_the_base_adds_its_divergence(family, adapter, packed):
    """And validation measures the cross-entropy alone."""
    model, base, weight = shake(make(family, ADAPTERS[adapter])), make(family), 0.7
    rows = list(documents(LENGTHS))
    step, batch = Whole(NextToken(weight)), collate([rows] if packed else rows)
    ours, theirs = (torch.cat([with_all(one, *row) for row in rows]) for one in (model, base))
    kl = (theirs[:, 1:].exp() * (theirs - ours)[:, 1:]).sum() / 2
    nll = -ours[:, 0].sum() / 2
    loss = step.loss(model, batch, 2.0)
    found = torch.stack([loss, step.measures["kl"], step.measures["nll"]])
    torch.testing.assert_close(found, torch.stack([nll + weight * kl, kl, nll]), rtol=1e-6, atol=1e-8)
    plain = Whole()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    of_base = torch.autograd.grad(kl, trained, allow_unused=True)
    alone = torch.autograd.grad(plain.loss(model, batch, 2.0), trained, allow_unused=True)  # with L2Wrap's part
    for mine, *parts in zip(torch.autograd.grad(loss, trained, allow_unused=True), alone, of_base):
        if mine is not None:
            torch.testing.assert_close(mine, parts[0] + weight * parts[1], rtol=1e-5, atol=1e-7)
    assert torch.equal(step.total(model, batch), plain.total(model, batch)) and not step.measures


@pytest.mark.parametrize("name", [name for name, (one, _) in FORMULAS.items() if not (one.asks_base or one.of_tokens)])
def test_a_whole_model_learns_without_a_base_its_head_too(name):
    compare(name, DISTINCT[1], None)


@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
@pytest.mark.parametrize(
    "objective, name, loss",
    [(DPO(nll=0), "dpo", math.log(2)), (IPO(0.5), "ipo", 1.0), (KTO(0.1, 3.0, 5.0), "kto", (3 + 5 + 3) / 3 / 2)],
    ids=("dpo", "ipo", "kto"),
)
def test_a_fresh_adapter_is_the_base(family, objective, name, loss):
    model, step = make(family, ADAPTERS["bat-in"], dtype=torch.float32), Whole(objective)
    found = step.loss(model, batch_of(name), 3)
    assert found.item() == pytest.approx(loss, abs=1e-6) and step.measures["margin"] == 0


@pytest.mark.parametrize("before, kl", [({}, 0.0), ({"kl": -3.0}, 0.0), ({"kl": 2.0}, 2.0)])
def test_kl_is_that_of_the_step_before_no_less_than_0_and_has_no_gradient(before, kl):
    likelihood = torch.tensor([[0.5, -1.0], [0.5, 4.0]], requires_grad=True)
    answers = SimpleNamespace(gains=likelihood.unbind(1), labels=torch.tensor([True, False]), figures=before)
    losses, figures = KTO(1.0).losses(answers)
    losses.sum().backward()
    assert figures["kl"].tolist() == [-1.0, 4.0] and (likelihood.grad[:, 1] == 0).all()
    assert figures["margin"].tolist() == [0.5 - kl, kl - 0.5]


@pytest.mark.parametrize("certain", [0.0, -1e-9])
def test_the_odds_of_an_answer_that_is_certain_are_finite(certain):
    likelihood = torch.tensor([[certain, -2.0], [-2.0, certain]], requires_grad=True)
    losses, figures = ORPO().losses(SimpleNamespace(likelihood=likelihood, lengths=torch.ones(2, 2)))
    losses.sum().backward()
    assert losses.isfinite().all() and likelihood.grad.isfinite().all() and figures["margin"].isfinite().all()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_does_not_touch_what_answers_are_measured_by(method):
    adapter = AdapterConfig(method=method, rank=4, alpha=8.0, dropout=0.5)
    model, batch = shake(make(DISTINCT[0], adapter)), batch_of("dpo", [7, 4])
    through = partial(plain_forward, model, batch)
    with torch.no_grad(), untrained(model):
        model.train()
        dropping = log_probabilities(through, batch)
        model.eval()
        torch.testing.assert_close(dropping, log_probabilities(through, batch), rtol=0, atol=0)
