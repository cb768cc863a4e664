"""Ranks are matched to one number of parameters."""

import pytest

from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.cli.errors import UserError
from rwkv_peft.tools.compare.sizes import Layers, fits, matched_size, parameter_count

LAYERS = Layers([(64, 64), (64, 64), (224, 64), (64, 224)])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wanted", [1, 5000, 10**9])
def test_no_rank_that_fits_is_nearer(name, wanted):
    method = METHODS[name]
    size = matched_size(method, wanted, LAYERS)
    assert fits(method, size.rank, size.mini_rank, LAYERS)
    assert size.parameters == parameter_count(method, size.rank, size.mini_rank, LAYERS)
    others = [
        parameter_count(method, rank, size.mini_rank, LAYERS)
        for rank in range(1, 225)
        if fits(method, rank, size.mini_rank, LAYERS)
    ]
    assert abs(size.parameters - wanted) == min(abs(other - wanted) for other in others)


def test_counts_are_those_of_the_tensors_that_train():
    assert parameter_count(METHODS["bone"], 8, 0, LAYERS) == 8 * (64 + 64 + 224 + 64)
    assert parameter_count(METHODS["bat-in"], 8, 0, LAYERS) == 8 * (64 + 64 + 64 + 224)
    assert parameter_count(METHODS["pissa"], 4, 0, LAYERS) == 4 * (4 * 64 + 2 * (64 + 224))
    assert matched_size(METHODS["lora"], 8 * 416, LAYERS)[:2] == (4, 0)


def test_a_model_that_no_rank_fits_is_told(monkeypatch):
    monkeypatch.setattr("rwkv_peft.tools.compare.sizes.fits", lambda *rest: False)
    with pytest.raises(UserError, match="no rank of bat-out fits every layer"):
        matched_size(METHODS["bat-out"], 100, LAYERS)
