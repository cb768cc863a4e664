"""The divergence from a teacher's stored word is that of the distributions over its words and the class of all others,
in float64; with all but one word stored it is that from the teacher itself."""

import pytest
import torch

from objectives.test_teaching import apart
from rwkv_peft.objectives.divergence import Divergence, divergence, most_probable

KINDS = (("forward", 0.5), ("reverse", 0.5), ("jsd", 0.3))


def logits(V, n=6):
    generator = torch.Generator().manual_seed(V)
    student, teacher = (3 * torch.randn(n, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("V, number", [(33, 1), (33, 8), (7, 3)])
@pytest.mark.parametrize("kind, beta", KINDS)
def test_values_and_gradients(kind, beta, V, number, temperature):
    student, teacher = logits(V)
    stored = most_probable(teacher, number, temperature)
    p, q = ((each / temperature).softmax(1) for each in (student, teacher))
    words = teacher.argsort(1, descending=True)[:, :number]
    (p, q) = (torch.cat([each.gather(1, words), 1 - each.gather(1, words).sum(1, keepdim=True)], 1) for each in (p, q))
    expected = temperature**2 * apart(p, q, kind, beta)
    before = stored.logprobs.clone()
    values, gradient = divergence(student.detach().clone(), stored, Divergence(kind, beta, temperature, 1.0))
    assert torch.equal(stored.logprobs, before)
    torch.testing.assert_close(stored.logprobs.exp(), q)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind, beta", KINDS)
def test_all_words_are_the_teacher(kind, beta):
    student, teacher = (each.detach() for each in logits(9))
    settings = Divergence(kind, beta, 1.5, 1.0)
    found = divergence(student.clone(), most_probable(teacher, 8, 1.5), settings)
    for ours, whole in zip(found, divergence(student.clone(), teacher, settings)):
        torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-12)


def test_a_sure_teacher_and_a_student_that_disagrees_stay_finite():
    student, teacher = torch.zeros(1, 9), torch.zeros(1, 9)
    student[0, 0], teacher[0, 1] = 200.0, 200.0  # in float32 the others' probability is 0
    for kind, beta in KINDS:
        values, gradient = divergence(student.clone(), most_probable(teacher, 2, 1.0), Divergence(kind, beta, 1.0, 1.0))
        assert values.isfinite().all() and gradient.isfinite().all()
