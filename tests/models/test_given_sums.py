"""A model of bone's layers to which norms give their inputs' sums over shards, as on a GPU, computes what it does where
each layer sums up for itself."""

import copy

import pytest
import torch

from models.test_left_open import on_shims
from models.test_residuals import model_of, step
from rwkv_peft.adapters import layer as adapter_layer
from rwkv_peft.adapters.layer import AdapterLinear
from rwkv_peft.models import FAMILIES
from rwkv_peft.ops.bone import op as bone_op

INPUTS = {"x060": 12, "x070": 8}  # of layers that are points of norms, in two blocks
# Tensors by which kernels give sums, or are given gradients of them: block 0's first norm, of an embedding that is
# frozen, needs none of these; lerp_affine gives those of four points in one.
PASSES = {
    "x060": dict(lerp_affine_forward=2, norm_lerp_forward=4, lerp_low_backward=4, norm_lerp_backward=4),
    "x070": dict(norm_lerp_forward=8, norm_lerp_backward=5),
}


@pytest.mark.parametrize("lengths", [None, (3, 1, 66)], ids=("rows", "packed"))
@pytest.mark.parametrize("checkpoint", (False, True))
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_model_on_a_gpus_kernels(family, checkpoint, lengths, monkeypatch):
    """Logits, states and all gradients in bfloat16, at most twice as far from float64 as where no sums are given."""
    model = model_of(family, "bone", checkpoint, rank=16)
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    tokens = (torch.arange(70).view(2, 35) if lengths is None else torch.arange(70)[None]) % 40
    model.bfloat16()
    true = step(copy.deepcopy(model).double(), tokens, bounds)
    launched, summed, shard_sum = on_shims(monkeypatch), [], bone_op.cuda.shard_sum
    monkeypatch.setattr(bone_op.cuda, "shard_sum", lambda x, rank: (summed.append(x.shape), shard_sum(x, rank))[1])
    found = step(model, tokens, bounds)
    passes = [name for name, keys in launched for key in keys if key.startswith(("shift", "gshift"))]
    times = 1 + checkpoint
    assert {name: passes.count(name) for name in set(passes)} == {
        name: count * (times if "forward" in name else 1) for name, count in PASSES[family.version].items()
    }
    given = len(summed)
    monkeypatch.setattr(adapter_layer, "takes_sums", lambda *_: False)
    summed.clear()
    apart = step(model, tokens, bounds)
    assert len(summed) - given == INPUTS[family.version] * times
    for i, (x, low, exact) in enumerate(zip(found, apart, true, strict=True)):
        assert (x.double() - exact).norm() <= 2 * (low.double() - exact).norm(), i


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_an_input_with_a_second_user_is_kept(family, monkeypatch):
    """RWKV-7's values', of which a residual is made, too: bent, it would be another."""
    model, kept = model_of(family, "bone", False, "bat-in"), []
    monkeypatch.setattr(AdapterLinear, "bones", lambda self, x, keep: kept.append(self) if keep else None)
    model(torch.arange(12)[None])
    expected = {"x060": [], "x070": [block.att.value for block in model.blocks]}
    assert kept == expected[family.version]
