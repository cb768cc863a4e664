"""benchmarks/mix.py times two ways to compute the same."""

import pytest
import torch

from rwkv_peft.ops.mix import cpu


def test_both_ways_compute_the_same(benchmark, monkeypatch):
    if cpu.FAMILY.unavailable():
        pytest.skip("no C++ compiler")
    operations = benchmark("mix").operations(5, 2, torch.float32)
    assert len(operations) == 6
    found = {name: benchmark("mix").results(*operation) for name, operation in operations.items()}
    monkeypatch.setattr(cpu.FAMILY, "unavailable", lambda: "no compiler")
    for name, operation in operations.items():
        for one, two in zip(found[name], benchmark("mix").results(*operation), strict=True):
            assert type(one.grad_fn) is not type(two.grad_fn), name
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
