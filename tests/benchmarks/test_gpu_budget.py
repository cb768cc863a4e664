"""What a block moves and launches on a GPU's code path does not grow unseen; docs/benchmarks/gpus.md has the aims."""

import importlib.util
from pathlib import Path

import pytest
import torch

from rwkv_peft.models import family_named

SOURCE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_budget.py"
# launches, units of (T, C) at 2048 channels
LIMITS = {
    ("x060", "frozen"): (35, 75),
    ("x060", "bat-in"): (57, 112),
    ("x060", "bone"): (62, 105),
    ("x060", "bat-out"): (91, 149),
    ("x060", "lora"): (81, 128),
    ("x070", "frozen"): (45, 111),
    ("x070", "bat-in"): (69, 150),
    ("x070", "bone"): (65, 136),
    ("x070", "bat-out"): (87, 178),
    ("x070", "lora"): (79, 154),
}


@pytest.fixture(scope="module")
def budget():
    spec = importlib.util.spec_from_file_location("gpu_budget", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version, method", LIMITS)
def test_a_block_stays_within_its_budget(budget, version, method):
    found = budget.figures(family_named(version), 2048, 4096, method)
    launches, units = LIMITS[version, method]
    assert found["launches"] <= launches and found["units"] <= units + 0.5, found


@pytest.mark.parametrize("method, aim", [("frozen", 75), ("bat-in", 200), ("bone", 130), ("lora", 140)])
def test_a_block_of_rwkv6_is_within_the_aims(budget, method, aim):
    found = budget.figures(family_named("x060"), 2048, 4096, method)
    assert found["launches"] <= 100 and found["units"] <= aim, found


@pytest.mark.parametrize("channels, aim", [(2048, 1.5), (4096, 1.27)])
def test_bat_in_is_as_near_the_floor_as_it_is_to_be(budget, channels, aim):
    assert budget.figures(family_named("x060"), channels, 2 * channels, "bat-in")["ratio"] <= aim


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
