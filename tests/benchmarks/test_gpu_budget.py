"""A block's bytes and launches on a GPU's code path do not grow unseen."""

import pytest
import torch

from rwkv_peft.models import family_named

# launches, units of (T, C) at 2048 channels
LIMITS = {
    "x060": {"frozen": (55, 106), "bat-in": (95, 186), "bone": (95, 160), "bat-out": (111, 180), "lora": (103, 171)},
    "x070": {"frozen": (62, 162), "bat-in": (92, 230), "bone": (92, 208), "bat-out": (104, 229), "lora": (98, 218)},
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


def test_one_row_counts_passes_over_groups_and_gaps(budget):
    family = family_named("x060")
    assert budget.passes_over_groups(family, 2048)[0] == 4  # 32 heads leave most of a card idle
    assert budget.passes_over_groups(family, 128 * 64) == (0, 0)  # 128 do not
    found = budget.figures(family, 2048, 4096, "frozen")
    assert found["one_row"] > found["ratio"] + budget.GAP * found["launches"] / found["seconds"]


def test_the_loss_reads_and_writes_the_logits_once(budget):
    assert budget.loss_passes() < 2.01


def test_a_draw_with_top_p_stays_within_its_budget(budget):
    """For any number of rows: torch sorts fewer than 128 one after another."""
    for rows in (1, 64):
        launches, moved = budget.drawing(rows)
        assert launches <= 57 and moved <= 335


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
