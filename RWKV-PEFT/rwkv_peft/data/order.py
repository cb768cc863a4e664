"""The order in which samples are visited: a permutation computed one position at a time."""

import hashlib
from collections.abc import Iterator


class Permutation:
    """A bijection of range(size) that depends only on `key`: permutation[i] in constant time and memory.

    Cubing is a bijection modulo a prime that is 2 modulo 3, the idea of RWKV-LM's "magic prime".
    Here the prime is the first one at or above size. A value outside range(size) passes through the
    map again until it falls inside, so that no sample is left out. Two rounds of a (x + b)^3 + c,
    their constants hashed from the key, give each key an order of its own.
    """

    def __init__(self, size: int, *key: object) -> None:
        self.size = size
        self.prime = next(n for n in range(max(size, 2), 2 * size + 8) if n % 3 == 2 and is_prime(n))
        digest = hashlib.blake2b(repr(key).encode(), digest_size=48).digest()
        draw = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 48, 8)]
        prime = self.prime
        self._rounds = [(1 + draw[i] % (prime - 1), draw[i + 1] % prime, draw[i + 2] % prime) for i in (0, 3)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.size:
            raise IndexError(position)
        value = self._map(position)
        while value >= self.size:
            value = self._map(value)
        return value

    def __iter__(self) -> Iterator[int]:
        return map(self.__getitem__, range(self.size))

    def _map(self, x: int) -> int:
        for a, b, c in self._rounds:
            x = (a * pow(x + b, 3, self.prime) + c) % self.prime
        return x


def magic_prime(tokens: int, ctx_len: int) -> int | None:
    """RWKV-LM's --magic_prime for this many tokens: the largest prime p = 2 (mod 3) with
    p <= tokens / ctx_len - 1, or None if there is none."""
    return next((n for n in range(tokens // ctx_len - 1, 1, -1) if n % 3 == 2 and is_prime(n)), None)


def is_prime(n: int) -> bool:
    """True for a prime, by Miller-Rabin with bases for every n below 3.3e24 (Sorenson and Webster 2015)."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if n < 2 or any(n % p == 0 for p in bases):
        return n in bases
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        if not any((x := x * x % n) == n - 1 for _ in range(twos - 1)):
            return False
    return True
