"""A block's bytes and launches on a GPU's code path do not grow unseen, and its fusions pay."""

import pytest
import torch

from rwkv_peft.models import family_named

LAW = ("frozen", "bat-in", "bone", "lora")
# launches, units of (T, C) at 2048 channels
LIMITS = {
    "x060": {"frozen": (41, 88), "bat-in": (79, 147), "bone": (81, 142), "bat-out": (97, 162), "lora": (89, 153)},
    "x070": {"frozen": (50, 123), "bat-in": (78, 167), "bone": (80, 169), "bat-out": (92, 190), "lora": (86, 179)},
}
LIMITS = {(version, method): limits for version, of in LIMITS.items() for method, limits in of.items()}


@pytest.fixture(scope="module")
def budget(benchmark):
    return benchmark("gpu_budget")


@pytest.mark.parametrize("version, method", LIMITS)
def test_a_block_stays_within_its_budget(budget, version, method):
    found = budget.figures(family_named(version), 2048, 4096, method)
    launches, units = LIMITS[version, method]
    assert found["launches"] <= launches and found["units"] <= units + 0.5, found


@pytest.mark.parametrize("channels", (2048, 4096))
@pytest.mark.parametrize("version, method", [(version, method) for version in ("x060", "x070") for method in LAW])
def test_fused_blocks_save_3_percent_of_a_step(budget, version, method, channels):
    """At every official size; otherwise fused/ is not worth its code."""
    fused, plain = (budget.figures(family_named(version), channels, 2 * channels, method, way) for way in (True, False))
    assert fused["one_row"] <= 0.97 * plain["one_row"]


def test_one_row_counts_passes_over_groups_and_gaps(budget):
    family = family_named("x060")
    assert budget.passes_over_groups(family, 2048)[0] == 4  # 32 heads leave most of a card idle
    assert budget.passes_over_groups(family, 128 * 64) == (0, 0)  # 128 do not
    found = budget.figures(family, 2048, 4096, "frozen")
    assert found["one_row"] > found["ratio"] + budget.GAP * found["launches"] / found["seconds"]


def test_the_loss_reads_and_writes_the_logits_once(budget):
    assert budget.loss_passes() < 2.01


def test_bytes_are_counted_as_they_lie_in_memory(budget):
    x = torch.empty(4, 8, dtype=torch.bfloat16, device="meta")
    counter = budget.Counter({(8, 8)})
    with counter:
        torch.add(x, x[:1].expand(4, 8))
        x @ torch.empty(8, 8, dtype=torch.bfloat16, device="meta")
        x.view(32)
    add, product = counter.launches
    assert (add.name, add.bytes, add.is_large) == ("add", 2 * (32 + 8 + 32), False)
    assert (product.bytes, product.is_large) == (2 * (32 + 64 + 32), True)
