"""The divergence from a teacher and its gradients are those of the formulas in float64, whatever the chunking."""

import pytest
import torch
import torch.nn.functional as F

from families import DISTINCT, shaken
from rwkv_peft.data.samples import positions
from rwkv_peft.objectives import cross_entropy, divergence
from rwkv_peft.objectives.cross_entropy import linear_cross_entropy
from rwkv_peft.objectives.distill import Distill
from rwkv_peft.objectives.divergence import Divergence, linear_divergence
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
    loss = settings.weight * kl + (1 - settings.weight) * nll
    penalty = 0.5 * cross_entropy.L2WRAP * ours.max(dim=1).values.square().sum() / count
    return loss, kl, nll, loss + (1 - settings.weight) * penalty


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


@pytest.mark.parametrize("elements", [1, 33 * 4 * divergence.ALIVE, 2**25])
@pytest.mark.parametrize("temperature, weight", [(1.0, 1.0), (2.5, 0.3)])
@pytest.mark.parametrize("kind, beta", [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.93)])
def test_values_and_gradients(monkeypatch, elements, kind, beta, temperature, weight):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", elements)
    student, teacher, targets, mask = problem()
    settings = Divergence(kind, beta, temperature, weight)
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
    logits = [F.linear(side.reshape(-1, side.shape[-1]), matrix) for side, matrix in (student, (hidden, head))]
    gradient = torch.zeros_like(logits[0])
    gradient.index_add_(
        0, often, divergence.of_logits(*(side[often] for side in logits), targets.flatten()[often], 5, settings)[1]
    )
    expected = (gradient.detach() @ student[1]).view_as(student[0])
    torch.testing.assert_close(torch.autograd.grad(ours[0], student[0])[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("V, T", [(2, 1), (7, 3), (257, 5)])
def test_odd_sizes(V, T):
    student, teacher, targets, _ = problem(B=1, T=T, V=V)
    mask = torch.ones(1, T, dtype=torch.bool)
    settings = Divergence("jsd", 0.3, 0.7, 0.6)
    *values, _ = plain(student, teacher, targets, mask, 1, settings)
    torch.testing.assert_close(found(student, teacher, targets, mask, 1, settings), torch.stack(values))


def test_the_ends_of_jensen_shannon_are_the_two_divergences():
    """Divided by beta it tends to the forward divergence, and by 1 - beta to the reverse one."""
    for kind, beta, scale in (("forward", 1e-8, 1e8), ("reverse", 1 - 1e-8, 1e8)):
        one, near = (found(*problem(), 1, Divergence(kind, beta, 1.0, 1.0))[0] for kind in (kind, "jsd"))
        assert scale * near.item() == pytest.approx(one.item(), rel=1e-3)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind):
    student, _, targets, mask = problem()
    same = tuple(tensor.detach() for tensor in student)
    loss = found(student, same, targets, mask, 1, Divergence(kind, 0.3, 1.3, 1.0))[0]
    assert abs(loss.item()) < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in torch.autograd.grad(loss, student))


def test_without_a_share_of_the_teacher_it_is_the_next_tokens_loss():
    student, teacher, targets, mask = problem()
    loss = found(student, teacher, targets, mask, 4, Divergence("forward", 0.5, 1.0, 0.0))[0]
    due = linear_cross_entropy(*student, targets, positions(mask), 4)
    torch.testing.assert_close(loss, due, rtol=1e-12, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, student), torch.autograd.grad(due, student)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_no_more_than_a_chunk_of_logits_is_alive(monkeypatch):
    """No tensor that is made has more rows of the vocabulary than a chunk, the teacher's logits included."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 33 * 2 * divergence.ALIVE)
    student, teacher, targets, mask = problem(T=40)
    weights = {id(student[1]), id(teacher[1])}
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor) and id(tensor) not in weights and 33 in tensor.shape[1:]:
                    sizes.append(tensor.shape[0])
            return result

    with Sizes():
        found(student, teacher, targets, mask, 4, Divergence("jsd", 0.3, 1.3, 0.5))
    assert sizes and {size for size in sizes if size not in (12, 10)} == {2, mask.sum().item() % 2} - {0}


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
