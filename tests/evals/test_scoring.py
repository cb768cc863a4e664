"""A continuation's log-probability is that of the whole sequence read at once, in float64."""

import copy

import pytest
import torch

from families import DISTINCT, shaken
from rwkv_peft.cli.errors import UserError
from rwkv_peft.evals import asking
from rwkv_peft.evals.asking import score
from rwkv_peft.inference.reading import prefill
from rwkv_peft.models import family_named

PROMPTS = [[66, 5, 9], [7], [30, 1, 50, 3, 4, 5, 70, 8, 9, 11, 12]]
CONTINUATIONS = [[[4], [4, 9, 2]], [[1, 2, 3, 4, 5]], [[8, 8], [3], [70, 1, 2, 5]]]


@pytest.fixture(scope="module", params=(*DISTINCT, family_named("x070b")), ids=lambda family: family.name)
def model(request):
    """A random float64 model."""
    model = shaken(request.param, seed=2, n_embd=64, vocab_size=80, head_size=16)
    model.head.weight.data.normal_(std=0.5)
    return model.double().requires_grad_(False)


def reference(model, prompt, continuation, start):
    sequence = prompt + continuation
    logits, _ = model(torch.tensor([sequence[:-1]]), start)
    rows = logits[0, len(prompt) - 1 :].log_softmax(-1)
    tokens = torch.tensor(continuation)
    return rows.gather(1, tokens[:, None]).sum().item(), bool((rows.argmax(-1) == tokens).all())


@pytest.mark.parametrize("started, piece", [(False, 256), (True, 3)])
def test_scores_are_those_of_whole_sequences(model, started, piece, monkeypatch):
    monkeypatch.setattr(asking, "PIECE", piece)
    start = prefill(model, [[3, 1, 4]])[1] if started else None
    for prompt, texts, found in zip(PROMPTS, CONTINUATIONS, score(model, PROMPTS, CONTINUATIONS, start)):
        assert len(found) == len(texts)
        for text, (logprob, greedy) in zip(texts, found):
            expected = reference(model, prompt, text, start)
            assert logprob == pytest.approx(expected[0], rel=1e-6) and greedy is expected[1]


def test_the_greedy_continuation_is_told(model):
    sequence = list(PROMPTS[0])
    for _ in range(4):
        logits, _ = model(torch.tensor([sequence]))
        sequence.append(int(logits[0, -1].argmax()))
    best = sequence[len(PROMPTS[0]) :]
    (found,) = score(model, PROMPTS[:1], [[best, [*best[:-1], (best[-1] + 1) % 80]]])
    assert [greedy for _, greedy in found] == [True, False]


def test_scores_that_are_no_numbers_are_refused(model):
    broken = copy.deepcopy(model)
    broken.head.weight[3, 5] = torch.nan
    with pytest.raises(UserError, match="log-probabilities are NaN"):
        score(broken, PROMPTS, CONTINUATIONS)
