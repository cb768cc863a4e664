"""The order of samples: a bijection for every size, which depends only on its key."""

import pytest

from rwkv_peft.data.order import Permutation, is_prime, magic_prime


@pytest.mark.parametrize("size", [*range(1, 70), 509, 510, 512, 1000])
def test_every_position_once(size):
    for key in ((0, 0), (0, 1), (7, 0)):
        assert sorted(Permutation(size, *key)) == list(range(size))


def test_the_order_is_the_keys_alone():
    assert list(Permutation(100, 42, 3)) == list(Permutation(100, 42, 3))
    orders = {tuple(Permutation(100, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_mixes():
    order = list(Permutation(10007, 42, 0))
    half = sum(order[:5003]) / 5003
    assert abs(half - 5003) < 250
    assert sum(abs(a - b) == 1 for a, b in zip(order, order[1:])) < 20


def test_large_sizes_cost_nothing():
    order = Permutation(10**12, 1)
    assert len({order[i] for i in range(1000)}) == 1000


def test_primes():
    sieve = [n for n in range(2, 2000) if all(n % d for d in range(2, int(n**0.5) + 1))]
    assert [n for n in range(2000) if is_prime(n)] == sieve
    assert not is_prime(3215031751) and is_prime(2**61 - 1)


def test_magic_prime_is_the_one_that_rwkv_lm_uses():
    assert magic_prime(1498226207, 512) == 2926181  # MiniPile, as its README quotes
    assert magic_prime(1498226207, 4096) == 365759
    assert magic_prime(20, 10) is None
