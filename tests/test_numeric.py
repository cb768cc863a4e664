"""Numbers are told from what only looks like one."""

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from rwkv_peft.cli.names import all_finite, is_finite, is_number, is_whole


@pytest.mark.parametrize(
    "value, kinds",
    [
        (3, {is_whole, is_finite, is_number}),
        (-(10**400), {is_whole}),
        (1.5, {is_finite, is_number}),
        (-sys.float_info.max, {is_finite, is_number}),
        (Fraction(1, 3), {is_finite, is_number}),
        (np.float32(2), {is_finite, is_number}),
        (np.float32("inf"), set()),
        (math.nan, {is_number}),
        (-math.inf, {is_number}),
        *((value, set()) for value in (True, "3", None, [3], 1j)),
    ],
)
def test_a_value_is_of_these_kinds(value, kinds):
    assert {kind for kind in (is_whole, is_finite, is_number) if kind(value)} == kinds


def test_a_whole_number_may_have_to_be_so_large():
    assert is_whole(0, 0) and not is_whole(-1, 0) and not is_whole(0, 1)


@pytest.mark.parametrize("place", [0, (1 << 20) + 5])
def test_one_value_makes_a_tensor_infinite(place):
    tensor = torch.full(((1 << 20) + 6,), 3e38)  # their sum is infinite
    assert all_finite(tensor) and all_finite(tensor[:0])
    for value in (math.nan, -math.inf):
        tensor[place] = value
        assert not all_finite(tensor)
