"""Sampling draws from the distribution that its settings define, and a row's token depends only on that row."""

import random
from bisect import bisect_right
from itertools import accumulate

import pytest
import torch

from rwkv_peft.cli.errors import UserError
from rwkv_peft.inference import sampling as sampling_module
from rwkv_peft.inference.sampling import (
    candidates,
    count,
    fill_numbers,
    first_largest,
    largest,
    penalize,
    pick,
    sample,
    select,
)
from rwkv_peft.inference.settings import Sampling


def logits_of(*probabilities):
    return torch.tensor([probabilities]).log()


def distribution(logits, **settings):
    """The probability of each token (n, V) under settings."""
    weights, tokens = candidates(logits, Sampling(**settings))
    full = torch.zeros(logits.shape, dtype=torch.float64).scatter_add(1, tokens, weights)
    return full / full.sum(-1, keepdim=True)


def plain_nucleus(probabilities, share):
    """Top-p by its definition, for one row of float64 probabilities."""
    kept, total = torch.zeros_like(probabilities), 0.0
    for token in probabilities.sort(descending=True, stable=True).indices:
        kept[token] = probabilities[token]
        total += float(probabilities[token])
        if total >= share:
            break
    return kept / kept.sum()


@pytest.mark.parametrize(
    "top_p, expected",
    [
        (0.0, (0, 1, 0, 0)),
        (0.3, (0, 1, 0, 0)),
        (0.45, (0, 2 / 3, 1 / 3, 0)),
        (0.7, (1 / 4, 1 / 2, 1 / 4, 0)),
        (0.9, (0.2, 0.4, 0.2, 0.2)),
        (1.0, (0.2, 0.4, 0.2, 0.2)),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, expected):
    found = distribution(logits_of(0.2, 0.4, 0.2, 0.2), top_p=top_p)
    assert sorted(found[0].tolist()) == pytest.approx(sorted(expected))
    assert found[0, 1] == pytest.approx(expected[1])


@pytest.mark.parametrize("scale", [0.05, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.93, 0.999])
def test_top_p_equals_its_definition_on_a_large_vocabulary(scale, top_p):
    logits = scale * torch.randn(3, 3000, generator=torch.Generator().manual_seed(1))
    found = distribution(logits, top_p=top_p)
    probabilities = logits.softmax(-1).double()
    for row in range(3):
        torch.testing.assert_close(found[row], plain_nucleus(probabilities[row], top_p), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "logits, settings, expected",
    [
        (logits_of(0.1, 0.2, 0.3, 0.4), dict(top_k=2, top_p=1.0), (0, 0, 3 / 7, 4 / 7)),
        (logits_of(0.1, 0.2, 0.3, 0.4), dict(top_k=9, top_p=1.0), (0.1, 0.2, 0.3, 0.4)),
        (logits_of(0.1, 0.2, 0.3, 0.4), dict(top_k=2, top_p=0.5), (0, 0, 0, 1)),  # top_p among the tokens of top_k
        (logits_of(0.1, 0.2, 0.3, 0.4), dict(min_p=0.6, top_p=1.0), (0, 0, 3 / 7, 4 / 7)),
        (logits_of(0.1, 0.2, 0.3, 0.4), dict(min_p=0.6, top_k=3, top_p=0.5), (0, 0, 3 / 7, 4 / 7)),
        (logits_of(0.1, 0.2, 0.3, 0.4), dict(temperature=0.5, top_p=1.0), (1 / 30, 4 / 30, 9 / 30, 16 / 30)),
        (logits_of(0.01, 0.04, 0.09, 0.16), dict(temperature=2.0, top_p=1.0), (0.1, 0.2, 0.3, 0.4)),
        (torch.tensor([[1e4, 1e4 - 1, -1e4]]), dict(temperature=1e-30, top_p=1.0), (1, 0, 0)),  # no overflow
    ],
)
def test_top_k_min_p_and_temperature(logits, settings, expected):
    found = distribution(logits, **settings)
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-30},
        {"presence_penalty": 1e30, "frequency_penalty": -1e30},
        {"presence_penalty": -1e30, "temperature": 1e-30},
        {"repetition_penalty": 1e-30, "presence_penalty": 1e30},
        {"repetition_penalty": 1e30, "min_p": 1},
    ],
)
def test_the_most_extreme_settings_still_draw_a_token(settings):
    sampling, logits, counts = Sampling(**settings), torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 1e6, 0.0]])
    assert 0 <= int(sample(penalize(logits, counts, sampling), [0.5], sampling)) < 3


def test_penalties_lower_generated_tokens_and_their_counts_decay():
    counts = torch.zeros(1, 4)
    for token in (1, 1, 3):
        count(counts, torch.tensor([token]), 1.0)
    logits = penalize(torch.zeros(1, 4), counts, Sampling(presence_penalty=0.5, frequency_penalty=0.25))
    assert logits.tolist() == [[0, -1.0, 0, -0.75]]
    logits = penalize(torch.tensor([[2.0, 2, -2, -2]]), counts, Sampling(repetition_penalty=2, presence_penalty=0.5))
    assert logits.tolist() == [[2.0, 0.5, -2, -4.5]]
    counts = torch.zeros(2, 3)
    count(counts, torch.tensor([0, 2]), 0.5)
    count(counts, torch.tensor([1, 2]), 0.5)
    assert counts.tolist() == [[0.5, 1, 0], [0, 0, 1.5]]


def test_a_number_falls_on_the_token_whose_share_covers_it():
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]], dtype=torch.float64)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.9999, 1 - 2**-53], dtype=torch.float64)
    assert pick(weights.expand(5, 5), uniforms)[:, 0].tolist() == [1, 1, 3, 3, 3]


def test_draws_have_the_frequencies_of_the_distribution():
    source, expected = random.Random(0), torch.tensor([0.5, 0.3, 0.2])
    tokens = sample(expected.log().expand(20000, 3), [source.random() for _ in range(20000)], Sampling(top_p=1.0))
    assert (tokens.bincount(minlength=3) / 20000 - expected).abs().max() < 0.015  # four standard deviations


@pytest.mark.parametrize(
    "settings", [{}, {"top_p": 1.0}, {"top_k": 5}, {"temperature": 0}, {"top_p": 0.99, "temperature": 3}]
)
def test_a_row_draws_the_same_alone_and_in_a_batch(settings):
    logits = 3 * torch.randn(6, 500, generator=torch.Generator().manual_seed(2))
    logits[0] *= 0.01  # a flat row, which makes the batch look at more candidates
    numbers = [0.1, 0.9, 0.5, 0.99, 0.0, 0.3]
    together = sample(logits, numbers, Sampling(**settings))
    alone = [int(sample(logits[i : i + 1], numbers[i : i + 1], Sampling(**settings))) for i in range(6)]
    assert together.tolist() == alone


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.99, "temperature": 3}, {"top_k": 5}, {"temperature": 0}])
def test_no_draw_reads_a_number_of_the_device_and_sorting_all_draws_the_same(settings, monkeypatch):
    """A tensor without data has none to read, and takes the way of a GPU's."""
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(2))
    numbers, sampling = [0.1, 0.9, 0.5, 0.99, 0.0, 0.3], Sampling(**settings)
    assert sample(logits.to("meta"), numbers, sampling).shape == (6,)
    expected = sample(logits, numbers, sampling)
    monkeypatch.setattr(sampling_module, "FIRST_CANDIDATES", 500)
    assert torch.equal(sample(logits, numbers, sampling), expected)


def selected(logits, uniforms, sampling):
    numbers = torch.zeros(3, dtype=torch.float64)
    return select(logits, torch.as_tensor(uniforms, dtype=torch.float64), fill_numbers(numbers, sampling)).tolist()


def sorted_nucleus(logits, sampling):
    """The tokens of a nucleus in order, and the sums of their probabilities in whole units of 2^-52, by sorting."""
    logits = (logits - logits.max()) / sampling.temperature
    probabilities = logits.softmax(-1).tolist()
    order = sorted(range(len(logits)), key=lambda token: (-probabilities[token], token))
    masses = [int(probabilities[token] * 2**52) for token in order]
    reach = sampling.top_p * 2**52
    kept = 1 + sum(before < reach for before in [*accumulate(masses)][:-1])
    kept = sum(mass >= sampling.min_p * masses[0] for mass in masses[:kept])
    return order[:kept], [*accumulate(masses[:kept])]


RANDOM = torch.Generator().manual_seed(4)
ADVERSARIAL = {
    "all equal": torch.zeros(97),
    "one alone": torch.full((64,), -torch.inf).index_fill(0, torch.tensor(40), 3.0),
    "most masked": torch.randn(130, generator=RANDOM).masked_fill(torch.arange(130) % 5 > 0, -torch.inf),
    "ties at the border": torch.tensor([2.0, 1.0, 1.0, 1.0, 3.0, 1.0, 0.0, 0.0]),
    "bfloat16": (2 * torch.randn(1000, generator=RANDOM)).bfloat16().float(),  # with many ties
    "one token": torch.tensor([5.0]),
    "below the least unit": torch.tensor([0.0, -50.0, -60.0, -80.0, -50.0]),
    "near ties": 1 + torch.arange(33).float() * 2**-22,
    "wide": 30 * torch.randn(257, generator=RANDOM),
}
NUCLEI = [
    *(Sampling(top_p=top_p) for top_p in (0.0, 1e-9, 0.3, 0.7, 0.5, 1 - 2**-53)),
    *(Sampling(top_p=0.95, min_p=0.2), Sampling(top_p=0.3, min_p=1.0), Sampling(top_p=0.999, temperature=2.5)),
    Sampling(top_p=0.9, temperature=1e-30),
]
NAMES = [f"top_p {each.top_p} min_p {each.min_p} temperature {each.temperature}" for each in NUCLEI]


@pytest.mark.parametrize("sampling", NUCLEI, ids=NAMES)
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_selection_draws_from_the_nucleus_that_sorting_finds(kind, sampling):
    """The middle of a token's part of the sum, for the first, the last and others, and numbers anywhere."""
    order, sums = sorted_nucleus(ADVERSARIAL[kind], sampling)
    some = sorted({0, len(order) - 1, *range(0, len(order), len(order) // 8 + 1)})
    middles = [(sums[place] + (sums[place - 1] if place else 0)) / 2 / sums[-1] for place in some]
    uniforms = [0.0, 1 - 2**-53, *(min(middle, 1 - 2**-53) for middle in middles), 0.1234, 0.77]
    expected = [order[bisect_right(sums, uniform * sums[-1])] for uniform in uniforms]
    assert selected(ADVERSARIAL[kind].expand(len(uniforms), -1), uniforms, sampling) == expected


@pytest.mark.parametrize("sampling", NUCLEI, ids=NAMES)
def test_selection_and_a_cpus_sorting_draw_the_same_tokens(sampling):
    logits = torch.tensor([0.01, 1, 3, 9, 0.3])[:, None] * torch.randn(5, 3001, generator=RANDOM)
    uniforms = [0.99, 0.5, 0.1, 0.75, 0.0]
    assert selected(logits, uniforms, sampling) == sample(logits, uniforms, sampling).tolist()
    assert selected(logits[2:3], uniforms[2:3], sampling) == selected(logits, uniforms, sampling)[2:3]


def test_selection_of_what_is_not_finite_reads_no_other_memory():
    rows = torch.zeros(3, 70)
    rows[0, 3], rows[1, 5], rows[2] = torch.nan, torch.inf, -torch.inf
    assert all(0 <= token < 70 for token in selected(rows, [0.0, 0.5, 1 - 2**-53], Sampling(top_p=0.7, min_p=0.1)))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": float("nan")}, "finite"),
        ({"temperature": 1e-46}, "temperature 1e-46"),
        ({"presence_penalty": 1e39}, "presence_penalty 1e"),
        ({"frequency_penalty": -1e39}, "frequency_penalty -1e"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"top_k": -2}, "top_k -2"),
        ({"min_p": -0.1}, "min_p -0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty 0"),
        ({"penalty_decay": 2}, "penalty_decay 2"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("size, k", [(64 * 40, 10), (64 * 40 + 1, 3), (64 * 300 + 63, 64), (5, 2), (900, 64)])
def test_the_largest_are_those_of_topk(size, k):
    x = torch.randperm(3 * size, generator=torch.Generator().manual_seed(k)).view(3, size).float()
    x[1] = x[1].sort().values  # all in the last places
    found, due = largest(x, k), x.topk(k)
    assert all(map(torch.equal, found, due))


@pytest.mark.parametrize("size", (64 * 40, 64 * 3 + 5, 64, 7))
def test_the_first_of_equal_numbers_is_the_largest(size):
    x = torch.randint(4, (9, size), generator=torch.Generator().manual_seed(size)).float()
    x[0], x[1, -1], x[2, 0] = 1.0, 9.0, 9.0
    assert torch.equal(first_largest(x), x.argmax(-1))
