"""The tables of docs/scale.md are what benchmarks/scale.py prints."""

import pytest

from programs import ROOT, load

scale = load("benchmarks", "scale")


@pytest.mark.parametrize("made", scale.TABLES, ids=lambda made: made.__name__)
def test_a_table_of_the_page_is_what_is_counted(made):
    assert f"\n\n{made()}\n\n" in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_a_token_costs_what_its_products_do():
    """7.2B by hand: 12 C² elements of large matrices a block, and the head; low-rank ones add some."""
    layers, channels = scale.SIZES["7.2B"]
    least = 2 * (layers * 12 * channels**2 + 65536 * channels)
    assert 4 < scale.Run("7.2B", "all", 1).token_flops / least < 4.3
    assert 3 < scale.Run("7.2B", "bat-in", 1).token_flops / least < 3.3


def test_a_gpu_sends_what_rings_do():
    alone, eight, all_told = (scale.Run("7.2B", "all", gpus) for gpus in scale.COUNTS)
    trains = alone.estimate.counts.trains
    assert alone.exchanged[0] == 0 and eight.exchanged == (2 * 2 * trains * 7 / 8, scale.NVLINK)
    assert all_told.exchanged[1] == scale.NETWORK
