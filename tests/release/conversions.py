"""Helpers of the tests of conversions."""

import torch

from rwkv_peft.release.convert import main


def convert(*words):
    assert main([str(word) for word in words]) == 0


def same(left, right):
    return list(left) == list(right) and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )
