"""SHiRA against Hugging Face peft's layer; the entries that train."""

import pytest
import torch
from torch import nn

from rwkv_peft.adapters.shira import columns_of


def test_values_and_gradients_are_those_of_pefts_layer(adapt):
    """peft counts r (in + out) entries, in any rows: 64 at r = 2 are 4 in each of 16 rows."""
    peft = pytest.importorskip("peft")
    layer = adapt(nn.Linear(16, 16, bias=False), "shira", entries=4, init_seed=9)
    mask = torch.zeros(16, 16).scatter(1, layer.shira_columns.long(), 1.0)
    config = peft.ShiraConfig(r=2, target_modules=["0"])
    config.mask_fn = lambda base, r, **rest: mask
    base = nn.Linear(16, 16, bias=False)
    base.load_state_dict({"weight": layer.weight})
    theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    values = theirs.shira_weight["default"]
    values.data = layer.shira_values.detach().flatten().clone()  # columns ascend in a row, as torch.where finds them
    x = torch.randn(2, 5, 16, requires_grad=True)
    g = torch.randn(2, 5, 16)
    ours = torch.autograd.grad(layer(x), (x, layer.shira_values), g)
    expected = torch.autograd.grad(theirs(x), (x, values), g)
    torch.testing.assert_close(layer(x), theirs(x))
    torch.testing.assert_close(ours[0], expected[0])
    torch.testing.assert_close(ours[1].flatten(), expected[1])


@pytest.mark.parametrize("width, entries", [(24, 4), (23, 5), (16, 16), (7, 6), (4096, 64)])
def test_columns_of_a_row_differ_and_ascend(width, entries):
    columns = columns_of(2, 50, width, entries)
    assert (columns.diff(dim=1) > 0).all() and columns.min() >= 0 and columns.max() < width
    assert torch.equal(columns_of(2, 10, width, entries)[:10], columns[:10])  # a band of rows has its own


def test_every_entry_may_be_drawn():
    columns = columns_of(0, 2000, 23, 5)
    assert columns.unique().tolist() == list(range(23))
