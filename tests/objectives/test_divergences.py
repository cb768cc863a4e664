"""The divergence from a teacher, and from the tokens of it that are stored, is that of the plain formula in float64, in
value and gradients; and a teacher may read other tokens than its student."""

import pytest
import torch
import torch.nn.functional as F

from families import DISTINCT, shaken
from rwkv_peft.data.samples import positions
from rwkv_peft.objectives import cross_entropy
from rwkv_peft.objectives import divergence as module
from rwkv_peft.objectives.distill import Distill
from rwkv_peft.objectives.divergence import Divergence, divergence, linear_divergence
from rwkv_peft.training.step.steps import Whole


def apart(p, q, kind, beta):
    """The divergence of distributions (n, V): p of the student, q of the teacher."""
    if kind == "forward":
        return (q * (q / p).log()).sum(1)
    if kind == "reverse":
        return (p * (p / q).log()).sum(1)
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum(1) + (1 - beta) * (p * (p / m).log()).sum(1)


def plain(student, teacher, targets, mask, count, settings):
    """(loss, divergence, cross-entropy, the loss whose gradient is due) through all logits; L2Wrap as the penalty whose
    gradient it is."""
    ours, theirs = (F.linear(hidden, weight).flatten(0, 1)[mask.flatten()] for hidden, weight in (student, teacher))
    p, q = ((logits / settings.temperature).softmax(1) for logits in (ours, theirs))
    kl = settings.temperature**2 * apart(p, q, settings.kind, settings.beta).sum() / count
    nll = F.cross_entropy(ours, targets[mask], reduction="sum") / count
    loss = settings.weight * kl + settings.nll * nll
    penalty = 0.5 * cross_entropy.L2WRAP * ours.max(dim=1).values.square().sum() / count
    return loss, kl, nll, loss + settings.nll * penalty


def problem(B=2, T=7, C=12, D=10, V=33, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    student = some(B, T, C).requires_grad_(), some(V, C).requires_grad_()
    teacher, targets = (some(B, T, D), some(V, D)), torch.randint(V, (B, T), generator=generator)
    return student, teacher, targets, torch.rand(B, T, generator=generator) < 0.6


def found(student, teacher, targets, mask, count, settings):
    """What the objective computes of a problem."""
    hidden, weight = teacher
    counted = positions(mask)
    known = hidden.reshape(-1, hidden.shape[-1])[counted]
    return linear_divergence(student, (known, weight), targets, counted, count, settings)


@pytest.mark.parametrize("elements", [1, 33 * 4 * module.ALIVE, 2**25])
@pytest.mark.parametrize("temperature, weight, beside", [(1, 1, None), (2.5, 0.3, None), (1, 0, None), (1, 0.3, 1)])
@pytest.mark.parametrize("kind, beta", [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.93)])
def test_values_and_gradients(monkeypatch, elements, kind, beta, temperature, weight, beside):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", elements)
    student, teacher, targets, mask = problem()
    settings = Divergence(kind, beta, temperature, weight, beside)
    *values, due = plain(student, teacher, targets, mask, 5, settings)
    ours = found(student, teacher, targets, mask, 5, settings)
    torch.testing.assert_close(ours, torch.stack(values), rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(3 * due, student)
    for mine, theirs in zip(torch.autograd.grad(3 * ours[0], student), expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_weights_multiply_what_tokens_add():
    """Whole numbers are as many tokens of the same kind."""
    student, (hidden, head), targets, _ = problem()
    weights = torch.randint(3, targets.shape, generator=torch.Generator().manual_seed(1)).double()
    settings = Divergence("jsd", 0.3, 1.5, 0.4)
    rows = hidden.reshape(-1, hidden.shape[-1])
    once, often = positions(weights != 0), torch.arange(targets.numel()).repeat_interleave(weights.flatten().long())
    ours = linear_divergence(student, (rows[once], head), targets, once, 5, settings, weights)
    due = linear_divergence(student, (rows[often], head), targets, often, 5, settings)
    torch.testing.assert_close(ours, due, rtol=1e-12, atol=0)
    parts = torch.rand(3, len(once), generator=torch.Generator().manual_seed(2)) < 0.5
    of_parts = linear_divergence(student, (rows[once], head), targets, once, 5, settings, weights, parts)[3:]
    for part, share in zip(parts, of_parts):
        alone = linear_divergence(student, (rows[once[part]], head), targets, once[part], 5, settings, weights)[2]
        torch.testing.assert_close(share, alone, rtol=1e-12, atol=1e-15)
    logits = [F.linear(side.reshape(-1, side.shape[-1]), matrix) for side, matrix in (student, (hidden, head))]
    gradient = torch.zeros_like(logits[0])
    gradient.index_add_(
        0, often, module.of_logits(*(side[often] for side in logits), targets.flatten()[often], 5, settings)[1]
    )
    expected = (gradient.detach() @ student[1]).view_as(student[0])
    torch.testing.assert_close(torch.autograd.grad(ours[0], student[0])[0], expected, rtol=1e-9, atol=1e-12)


def test_bfloat16_loses_no_more_than_plain_bfloat16():
    student, teacher, targets, mask = problem(T=64, C=64, D=48, V=500, dtype=torch.float32)
    settings = Divergence("forward", 0.5, 8.0, 1.0)  # so warm that no probability is 0 in the plain form
    exact = plain([t.double() for t in student], [t.double() for t in teacher], targets, mask, 70, settings)[3]
    exact_grad = torch.autograd.grad(exact, student[0])[0]
    low = [[t.detach().bfloat16().requires_grad_() for t in pair] for pair in (student, teacher)]
    naive = plain(*low, targets, mask, 70, settings)[3]
    ours = found(*low, targets, mask, 70, settings)[0]
    naive_grad, grad = (torch.autograd.grad(value, low[0][0], retain_graph=True)[0] for value in (naive, ours))
    assert (ours - exact).abs() <= 2 * (naive - exact).abs() + 1e-2 * exact
    assert (grad - exact_grad).norm() <= 2 * (naive_grad - exact_grad).norm()


def test_a_teacher_may_see_other_tokens():
    """Its context before the student's tokens, which alone count: the same as its word on the whole, cut."""
    student, teacher = (shaken(family, n_layer=1).double() for family in DISTINCT)
    context, row = torch.randint(30, (1, 5)), torch.randint(30, (1, 8))
    alone = {"tokens": row[:, :-1], "targets": row[:, 1:], "counted": torch.arange(2, 7)}
    more = {"teacher_tokens": torch.cat([context, row[:, :-1]], 1), "teacher_counted": alone["counted"] + 5}
    step = Whole(Distill("teacher.pth"), teacher=teacher)
    p = student(row[:, :-1])[0][0, 2:].softmax(1)
    q = teacher(more["teacher_tokens"])[0][0, 7:].softmax(1)
    due = (q * (q / p).log()).sum().item() / 5
    assert step.loss(student, alone | more, 5).item() == pytest.approx(due, rel=1e-9)
    assert step.loss(student, alone, 5).item() != pytest.approx(due, rel=1e-3)


KINDS = (("forward", 0.5), ("reverse", 0.5), ("jsd", 0.3))


def test_a_sure_teacher_and_a_student_that_disagrees_stay_finite():
    student, teacher = torch.zeros(1, 9), torch.zeros(1, 9)
    student[0, 0], teacher[0, 1] = 200.0, 200.0  # in float32 the others' probability is 0
    for kind, beta in KINDS:
        values, gradient = divergence(student.clone(), teacher, Divergence(kind, beta, 1.0, 1.0))
        assert values.isfinite().all() and gradient.isfinite().all()
