"""Contexts that continuations share are read once, and scores are those of each pair read by itself."""

from collections import Counter

import pytest
import torch

from families import DISTINCT, shaken
from rwkv_peft.evals import asking
from rwkv_peft.evals.asking import batches, score_pairs

EXAMPLES = [3 + 7 * i % 70 for i in range(9)]
# (context, continuation): two that share a context, an opening that four share, one of its own, an empty continuation
PAIRS = [
    *(([5, 9, 2], [4, 1]), ([*EXAMPLES, 1, 8], [7]), ([5, 9, 2], [6]), ([*EXAMPLES, 2], [7, 7, 7, 8, 9])),
    *(([*EXAMPLES, 1, 8], [3, 4]), ([*EXAMPLES], [11, 12]), ([44], [])),
    ([*EXAMPLES, 1, 9, 4, 4], [60, 2, 33, 3, 5]),
]


@pytest.fixture(scope="module")
def model():
    return shaken(DISTINCT[0], seed=3, n_embd=64, vocab_size=80, head_size=16).double().requires_grad_(False)


def alone(model, context, continuation):
    """(log-probability of a continuation, True if it is the greedy one), by reading the whole text at once."""
    logits, _ = model(torch.tensor([context + continuation]))
    rows, tokens = logits[0, len(context) - 1 : -1].log_softmax(-1), torch.tensor(continuation, dtype=torch.long)
    return rows.gather(1, tokens[:, None]).sum().item(), bool((rows.argmax(-1) == tokens).all())


@pytest.mark.parametrize("batch, opening, passes", [(1, 64, 4096), (2, 4, 4), (8, 64, 4096)])
def test_scores_are_those_of_each_pair_by_itself(model, monkeypatch, batch, opening, passes):
    read, forward = Counter(), model.forward
    monkeypatch.setattr(asking, "OPENING", opening)
    monkeypatch.setattr(asking, "PREFILL", passes)
    monkeypatch.setattr(model, "forward", lambda tokens, *rest, **named: forward(counted(tokens), *rest, **named))

    def counted(tokens):
        read["tokens"] += tokens.numel()
        return tokens

    found = dict(score_pairs(model, PAIRS, batch))
    assert sorted(found) == list(range(len(PAIRS)))
    once = {tuple(context) for context, continuation in PAIRS if continuation}
    whole = sum(map(len, once)) + sum(max(0, len(continuation) - 1) for _, continuation in PAIRS)
    assert read["tokens"] <= whole and (read["tokens"] < whole) is (opening == 4)
    for number, (context, continuation) in enumerate(PAIRS):
        logprob, greedy = alone(model, context, continuation)
        assert found[number].logprob == pytest.approx(logprob, rel=1e-6) and found[number].greedy is greedy


def test_batches_hold_every_number_once_and_no_more_than_they_may(monkeypatch):
    monkeypatch.setattr(asking, "TOGETHER", 3)
    behind = {(1, 2): list(range(8)), (1,): [8], (3, 4, 5): [9, 10], (6,): [11]}
    found = list(batches(behind, 2))
    assert sorted(number for batch in found for numbers in batch.values() for number in numbers) == list(range(12))
    assert all(sum(map(len, batch.values())) <= 3 for batch in found)
