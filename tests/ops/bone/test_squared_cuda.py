"""bat-in's affine form of a squared relu: its CUDA kernels, run on the CPU through tests/cuda_shim, against float64;
and through layers of bat-in around the square, alone and in a model."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn

from cuda_shim import shim
from ops.bone.cases import FACTOR, assert_as_exact_as_torch, plain, tensors
from rwkv_peft.adapters import layer as adapter_layer
from rwkv_peft.adapters.inject import inject
from rwkv_peft.config import AdapterConfig
from rwkv_peft.models import FAMILIES
from rwkv_peft.models.parts import Input, feed_forward
from rwkv_peft.ops import bone as bone_ops
from rwkv_peft.ops.bone import cuda

# tokens, in, out, rank: shards that groups do not divide, one shard, tiles that are not full, several strips
SIZES = [(1, 48, 32, 16), (71, 7 * 32, 64, 32), (130, 5 * 64, 64, 64), (33, 64, 192, 64), (301, 3 * 128, 128, 128)]


def case(sizes, spread=1):
    """x, bone, g, dz and left (T, r), in bfloat16; some x + left are 0."""
    tokens, _, _, rank = sizes
    _, (x, *others) = tensors(sizes, torch.bfloat16, spread)
    left = torch.randn(tokens, rank, generator=torch.Generator().manual_seed(5)).bfloat16()
    x[:, :rank:3] = -left[:, ::3]
    return x, *others, left


def squared(x, bone, g, dz, left):
    """z, shift, dx, the gradient of bone, and left's."""
    rank = left.shape[1]
    positive = torch.relu(x + left.repeat(1, x.shape[1] // rank))
    z, shift, ds, d_bone = plain(positive.square(), bone, g, dz)
    dx = 2 * positive * ds
    return z, shift, dx, d_bone, dx.unflatten(1, (-1, rank)).sum(1)


def ours(x, bone, g, dz, left):
    dx, (z, shift) = dz.clone(), bone_ops.affine(x, bone, FACTOR, left)
    d_bone = bone_ops.affine_backward_(dx, g, x, bone, FACTOR, left)
    return z, shift.sum(0), dx, d_bone, bone_ops.shard_sum(dx, left.shape[1])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward_and_backward(kernels, launched, sizes, monkeypatch):
    """With few blocks a sum over shards is one part, and a block has several tiles of tokens in backward."""
    inputs = case(sizes, spread=2)
    for blocks in (256, 2):
        monkeypatch.setattr(cuda, "BLOCKS", blocks)
        assert_as_exact_as_torch(ours(*inputs), inputs, squared)
    assert f"squared_backward_products_{sizes[-1]}" in launched and not [x for x in launched if "affine" in x]


@pytest.mark.parametrize("sizes", [(70, 100, 60, 20), (9, 96, 48, 48)], ids=str)
def test_a_rank_without_such_kernels_squares_apart(kernels, launched, sizes):
    inputs = case(sizes)
    assert_as_exact_as_torch(ours(*inputs), inputs, squared)
    assert not [x for x in launched if "squared" in x]


def test_what_is_not_positive_has_no_gradient_and_nan_stays(kernels):
    x, bone, g, dz, left = case((70, 128, 64, 64))
    z, _, dx, d_bone, _ = ours(-x.abs() - 9, bone, g, dz, left)
    assert not z.any() and not dx.any() and not d_bone.any()
    x[3, 5] = float("nan")
    z, _, dx, _, _ = ours(x, bone, g, dz, left)
    assert z[3, :64].isnan().all() and dx[3, 5].isnan() and not z[3, 64:].isnan().any() and not z[4:].isnan().any()


@pytest.mark.parametrize("order", shim.ORDERS[1:])
def test_the_order_of_threads_changes_no_bit(kernels, order, monkeypatch):
    monkeypatch.setattr(cuda, "BLOCKS", 2)
    cases = [case((150, 4 * rank, 2 * rank, rank)) for rank in (64, 128)]
    expected = [x for inputs in cases for x in ours(*inputs)]
    kernels.set_order(order)
    assert all(map(torch.equal, [x for inputs in cases for x in ours(*inputs)], expected))


def differentiated(module, run, dtype, *inputs):
    """run's result in a dtype, of a module whose numbers are bfloat16's, and the gradients of inputs and parameters."""
    module = copy.deepcopy(module).bfloat16().to(dtype)
    leaves = [x.bfloat16().to(dtype).requires_grad_() for x in inputs]
    y = run(module, *leaves)
    y.backward(torch.cos(torch.arange(y.numel())).view(y.shape).bfloat16().to(dtype))
    return [y, *(x.grad for x in leaves), *(p.grad for p in module.parameters() if p.requires_grad)]


def assert_as_exact_as_apart(module, run, *inputs):
    """That inside the pass results are at most twice as far from float64 as apart from it."""
    true, apart = (differentiated(module, run, dtype, *inputs) for dtype in (torch.float64, torch.bfloat16))
    with patch.object(adapter_layer, "takes_low_square", lambda *_: True):
        found = differentiated(module, run, torch.bfloat16, *inputs)
    for x, low, exact in zip(found, apart, true, strict=True):
        assert (x.double() - exact).norm() <= 2 * (low.double() - exact).norm()


def adapted(module, mode, rank, **settings):
    """The module with adapters of bat-in, whose numbers are not zero."""
    inject(module, AdapterConfig(method="bone", mode=mode, rank=rank, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 16)
    return module


@pytest.mark.parametrize("mode, rank", [("bat-in", 16), ("bat-in", 128), ("bat-in-scaled", 32)])
def test_a_feed_forward_between_two_layers(kernels, launched, mode, rank):
    torch.manual_seed(0)
    linear = nn.ModuleDict({"key": nn.Linear(128, 384, bias=False), "value": nn.Linear(384, 128, bias=False)})
    adapted(linear, mode, rank, targets=("key", "value"))
    x, residual = torch.randn(2, 35, 128), torch.randn(2, 35, 128)
    assert_as_exact_as_apart(
        linear, lambda m, x, residual: feed_forward(m["key"], m["value"], Input(x), residual)[0], x, residual
    )
    wanted = [f"squared_{way}_products_{rank}" for way in ("forward", "backward")]
    assert [name for name in launched if "squared" in name] == wanted


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.version)
def test_a_model_of_blocks(kernels, launched, family):
    """Logits and the gradients of all adapters."""
    torch.manual_seed(0)
    model = family.build(family.new_dimensions(n_layer=2, n_embd=64, vocab_size=257, head_size=16))
    family.init_weights(model)
    for block in model.blocks:
        nn.init.normal_(block.ffn.value.weight, std=0.1)  # which begins as zeros
    adapted(model, "bat-in", 16, targets=family.targets)
    tokens = torch.randint(257, (2, 35))
    assert_as_exact_as_apart(model, lambda m: m(tokens)[0])
    assert [launched.count(f"squared_{way}_products_16") for way in ("forward", "backward")] == [2, 2]
