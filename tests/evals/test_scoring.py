"""A continuation's log-probability is that of the whole sequence read at once, whatever is batched and read once."""

import copy
from collections import Counter

import pytest
import torch

from families import DISTINCT, shaken
from rwkv_peft.cli.errors import UserError
from rwkv_peft.evals import scoring
from rwkv_peft.evals.scoring import batches, score, score_pairs
from rwkv_peft.inference.forward import prefill
from rwkv_peft.models import family_named

PROMPTS = [[66, 5, 9], [7], [30, 1, 50, 3, 4, 5, 70, 8, 9, 11, 12]]
CONTINUATIONS = [[[4], [4, 9, 2]], [[1, 2, 3, 4, 5]], [[8, 8], [3], [70, 1, 2, 5]]]
EXAMPLES = [3 + 7 * i % 70 for i in range(9)]
# (context, continuation): two that share a context, a prefix that four share, one of its own, an empty continuation
PAIRS = [
    *(([5, 9, 2], [4, 1]), ([*EXAMPLES, 1, 8], [7]), ([5, 9, 2], [6]), ([*EXAMPLES, 2], [7, 7, 7, 8, 9])),
    *(([*EXAMPLES, 1, 8], [3, 4]), ([*EXAMPLES], [11, 12]), ([44], [])),
    ([*EXAMPLES, 1, 9, 4, 4], [60, 2, 33, 3, 5]),
]


@pytest.fixture(scope="module", params=(*DISTINCT, family_named("x070b")), ids=lambda family: family.name)
def model(request):
    """A random float64 model."""
    model = shaken(request.param, seed=2, n_embd=64, vocab_size=80, head_size=16)
    model.head.weight.data.normal_(std=0.5)
    return model.double().requires_grad_(False)


def reference(model, prompt, continuation, start=None):
    """(log-probability of a continuation, True if it is the greedy one), by reading the whole text at once."""
    logits, _ = model(torch.tensor([prompt + continuation]), start)
    rows, tokens = logits[0, len(prompt) - 1 : -1].log_softmax(-1), torch.tensor(continuation, dtype=torch.long)
    return rows.gather(1, tokens[:, None]).sum().item(), bool((rows.argmax(-1) == tokens).all())


@pytest.mark.parametrize("started, piece", [(False, 256), (True, 3)])
def test_scores_are_those_of_whole_sequences(model, started, piece, monkeypatch):
    monkeypatch.setattr(scoring, "PIECE", piece)
    start = prefill(model, [[3, 1, 4]])[1] if started else None
    for prompt, texts, found in zip(PROMPTS, CONTINUATIONS, score(model, PROMPTS, CONTINUATIONS, start)):
        assert len(found) == len(texts)
        for text, (logprob, greedy) in zip(texts, found):
            expected = reference(model, prompt, text, start)
            assert logprob == pytest.approx(expected[0], rel=1e-6) and greedy is expected[1]


def test_the_greedy_continuation_is_marked(model):
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


@pytest.mark.parametrize("batch, prefix, passes", [(1, 64, 4096), (2, 4, 4), (8, 64, 4096)])
def test_pairs_are_scored_as_each_by_itself_and_what_they_share_is_read_once(model, monkeypatch, batch, prefix, passes):
    read, forward = Counter(), model.forward
    monkeypatch.setattr(scoring, "PREFIX", prefix)
    monkeypatch.setattr(scoring, "PREFILL", passes)
    monkeypatch.setattr(model, "forward", lambda tokens, *rest, **named: forward(counted(tokens), *rest, **named))

    def counted(tokens):
        read["tokens"] += tokens.numel()
        return tokens

    found = dict(score_pairs(model, PAIRS, batch))
    assert sorted(found) == list(range(len(PAIRS)))
    once = {tuple(context) for context, continuation in PAIRS if continuation}
    whole = sum(map(len, once)) + sum(max(0, len(continuation) - 1) for _, continuation in PAIRS)
    assert read["tokens"] <= whole and (read["tokens"] < whole) is (prefix == 4)
    for number, (context, continuation) in enumerate(PAIRS):
        logprob, greedy = reference(model, context, continuation)
        assert found[number].logprob == pytest.approx(logprob, rel=1e-6) and found[number].greedy is greedy


def test_batches_hold_every_number_once_and_no_more_than_they_may(monkeypatch):
    monkeypatch.setattr(scoring, "TOGETHER", 3)
    behind = {(1, 2): list(range(8)), (1,): [8], (3, 4, 5): [9, 10], (6,): [11]}
    found = list(batches(behind, 2))
    assert sorted(number for batch in found for numbers in batch.values() for number in numbers) == list(range(12))
    assert all(sum(map(len, batch.values())) <= 3 for batch in found)
