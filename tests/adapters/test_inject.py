"""Adapter layers in a model: which layers are replaced, what trains, which mistakes are refused; and the laws of every
layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adapters.layers import merged_weight, tensors_of
from rwkv_peft.adapters.inject import check_adapter, inject
from rwkv_peft.adapters.methods import METHODS, word_of
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import AdapterConfig
from rwkv_peft.models import family_named
from rwkv_peft.models.rwkv6.keys import TARGETS

RWKV6 = family_named("x060")
RESIDUAL = tuple(name for name, method in METHODS.items() if method.residual)


class Mix(nn.Module):
    """One half of a block, with the names that an RWKV-6 has."""

    def __init__(self, shapes):
        super().__init__()
        for name, (out_features, in_features) in shapes.items():
            setattr(self, name, nn.Linear(in_features, out_features, bias=False))
        self.time_maa_k = nn.Parameter(torch.zeros(1, 1, 16))
        self.time_decay = nn.Parameter(torch.zeros(1, 1, 16))
        self.time_maa_w1 = nn.Parameter(torch.zeros(16, 4))
        self.ln_x = nn.LayerNorm(16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    square = (16, 16)
    att = dict.fromkeys(("receptance", "key", "value", "gate", "output"), square)
    ffn = {"key": (24, 16), "receptance": square, "value": (16, 24)}
    blocks = [nn.ModuleDict({"att": Mix(att), "ffn": Mix(ffn), "ln1": nn.LayerNorm(16)}) for _ in range(2)]
    ends = {"ln_out": nn.LayerNorm(16), "head": nn.Linear(16, 10, bias=False)}
    return nn.ModuleDict({"emb": nn.Embedding(10, 16), "blocks": nn.ModuleList(blocks), **ends})


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", METHODS)
def test_merged_weight_reproduces_the_adapter(variant, dtype, adapt):
    layer = adapt(nn.Linear(24, 16, dtype=dtype), variant)
    x = torch.randn(2, 5, 24, dtype=dtype)
    expected = F.linear(x.float(), merged_weight(layer), layer.bias.float())
    error = (layer(x).float() - expected).abs().max()
    assert error <= (2e-6 if dtype == torch.float32 else 3e-2) * expected.abs().max()
    assert merged_weight(layer).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", METHODS)
def test_merging_from_the_original_weight_is_exact(variant, dtype, adapt):
    base = nn.Linear(24, 16, bias=False, dtype=dtype)
    original = base.weight.detach().clone()
    layer = adapt(base, variant)
    params = {name: tensor.detach() for name, tensor in tensors_of(layer).items()}
    assert torch.equal(METHODS[variant].merged(original, params, scale=layer.scale), merged_weight(layer))


@pytest.mark.parametrize("variant", [v for v in METHODS if v not in RESIDUAL])
def test_a_fresh_adapter_leaves_the_output_bitwise_unchanged(variant, adapt):
    for dtype in (torch.float32, torch.bfloat16):
        base = nn.Linear(24, 16, dtype=dtype)
        batches = [torch.randn(tokens, 24, dtype=dtype) for tokens in (1, 9)]
        expected = [base(x) for x in batches]
        layer = adapt(base, variant, train=False)
        for x, y in zip(batches, expected):
            assert torch.equal(layer(x), y)


@pytest.mark.parametrize("variant", RESIDUAL)
def test_a_fresh_residual_adapter_leaves_the_output_unchanged_to_rounding(variant, adapt):
    base, x = nn.Linear(24, 16), torch.randn(9, 24)
    expected = base(x)
    layer = adapt(base, variant, train=False)
    assert layer.lora_B.abs().max() > 0
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("variant", METHODS)
def test_the_layer_keeps_the_base_keys_and_names_its_own_beside_them(variant, adapt):
    base = nn.Linear(24, 16)
    weight = base.weight
    layer = adapt(base, variant)
    assert layer.weight is weight
    assert set(layer.state_dict()) == {"weight", "bias", *layer.method.parameters}
    assert trainable(layer) == set(layer.method.parameters)
    assert set(tensors_of(layer)) >= set(layer.method.parameters)


@pytest.mark.parametrize("variant", METHODS)
def test_a_few_steps_reduce_a_loss(variant, adapt):
    layer = adapt(nn.Linear(24, 16), variant, train=False)
    x, target = torch.randn(32, 24), torch.randn(32, 16)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]


def test_every_target_of_every_block_is_replaced_and_the_rest_frozen(model):
    before = sum(p.numel() for p in model.parameters())
    report = inject(model, AdapterConfig(rank=8), family=RWKV6)
    assert len(report.replaced) == 2 * len(TARGETS)
    assert isinstance(model["head"], nn.Linear)
    assert trainable(model) == {f"{name}.bone" for name in report.replaced}
    assert report.trainable == 2 * (7 * 16 * 8 + 24 * 8)
    assert report.total == before + report.trainable
    percent = 100 * report.trainable / report.total
    assert (
        f"trainable params: {report.trainable:,} || all params: {report.total:,} || trainable%: {percent:.4f}"
        in str(report)
    )


def test_bone_on_rwkv6_7b_has_the_published_number_of_parameters():
    shapes = {(4096, 4096): 6, (14336, 4096): 1, (4096, 14336): 1}
    per_block = {"bat-in": 0, "bat-out": 0, "bone": 0}
    for mode in per_block:
        with torch.device("meta"):
            blocks = [
                nn.ModuleDict({"layer": nn.Linear(i, o, bias=False)}) for (o, i), n in shapes.items() for _ in range(n)
            ]
            for block in blocks:
                report = inject(block, AdapterConfig(mode=mode, rank=64, targets=("layer",)))
                per_block[mode] += report.trainable
    assert {32 * count for count in per_block.values()} == {88_080_384}


@pytest.mark.parametrize(
    "part, expected",
    [
        ("time", "blocks.{}.{}.time_maa_k blocks.{}.{}.time_decay blocks.{}.{}.time_maa_w1"),
        ("ln", "blocks.{}.{}.ln_x.weight blocks.{}.{}.ln_x.bias blocks.{}.ln1.weight blocks.{}.ln1.bias ln_out.weight"),
        ("emb", "emb.weight"),
        ("head", "head.weight"),
    ],
)
def test_train_parts_match_what_they_name(model, part, expected):
    names = {name.format(i, half) for name in expected.split() for i in (0, 1) for half in ("att", "ffn")}
    names |= {"ln_out.bias"} if part == "ln" else set()
    inject(model, AdapterConfig(rank=8, train_parts=(part,)), family=RWKV6)
    assert {name for name in trainable(model) if not name.endswith(".bone")} == names


def test_full_finetuning_trains_everything_or_the_parts_alone(model):
    report = inject(model, AdapterConfig(method="none"), family=RWKV6)
    assert report.trainable == report.total and not report.replaced
    inject(model, AdapterConfig(method="none", train_parts=("head",)), family=RWKV6)
    assert trainable(model) == {"head.weight"}


def test_targets_narrow_what_is_replaced(model):
    assert inject(model, AdapterConfig(rank=8, targets=("ffn.key",)), family=RWKV6).replaced == (
        "blocks.0.ffn.key",
        "blocks.1.ffn.key",
    )


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"method": "bonne"}, ["--peft bonne", "bone"]),
        ({"mode": "bat"}, ["--bone_mode bat", "bat-in", "bat-out"]),
        ({"quant": "int4"}, ["--quant int4", "nf4"]),
        ({"targets": ("att.kye",)}, ["att.kye", "att.key"]),
        ({"targets": ("head",)}, ["--train_parts head"]),
        ({"rank": 7}, ["7", "does not divide", "blocks.0.att.receptance", "--bone_r 8", "--bone_mode bone"]),
        ({"rank": 16}, ["16", "24", "blocks.0.ffn.key", "--bone_r 8"]),
        ({"rank": 0}, ["--bone_r 0", "at least 1"]),
        ({"mode": "bone", "rank": 17}, ["17", "16"]),
        ({"mode": "bone-mini", "rank": 4, "mini_rank": 5}, ["5 does not divide 16", "try --bone_mini_r 4"]),
        ({"mode": "bone-mini", "rank": 8}, ["try --bone_mini_r 8"]),
        ({"mode": "bone-mini", "rank": 17, "mini_rank": 4}, ["--bone_r 17", "16", "bone-mini"]),
        ({"method": "lora", "rank": 4, "alpha": -8.0}, ["alpha -8.0"]),
        ({"method": "lora", "rank": 4, "alpha": float("nan")}, ["alpha nan"]),
        ({"method": "lora-plus", "rank": 4, "lora_plus_ratio": float("inf")}, ["--loraplus_lr_ratio inf"]),
        ({"method": "pissa", "rank": 4, "svd_niter": -1}, ["svd_niter -1"]),
        ({"method": "lora", "rank": 17}, ["17", "16"]),
        ({"method": "lora-ga", "rank": 9}, ["9", "8"]),
        ({"method": "lora", "rank": 4, "dropout": 1.0}, ["dropout 1.0"]),
        ({"dropout": 0.1, "rank": 8}, ["dropout 0.1"]),
        ({"method": "none", "quant": "nf4"}, ["--quant nf4", "none"]),
        ({"rank": 8, "train_parts": ("tim",)}, ["tim", "time"]),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_before_anything_changes(model, settings, words):
    before = dict(model.state_dict())
    with pytest.raises(UserError) as error:
        inject(model, AdapterConfig(**settings), family=RWKV6)
    for word in words:
        assert word in str(error.value)
    assert dict(model.state_dict()).keys() == before.keys() and trainable(model) == set(dict(model.named_parameters()))


@pytest.mark.parametrize("variant", RESIDUAL)
@pytest.mark.parametrize("shape", [(4,), (1, 16), (3, 16), (4, 17)])
def test_first_factors_of_another_shape_are_refused(model, variant, shape):
    """Broadcasting would repeat one row."""
    initial = {"blocks.0.att.key.init_lora_A": torch.ones(shape), "blocks.0.att.key.init_lora_B": torch.ones(16, 4)}
    config = AdapterConfig(method=word_of(METHODS[variant]).name, rank=4, targets=("att.key",))
    with pytest.raises(UserError, match=r"has blocks.0.att.key.init_lora_A of shape .*, and \(4, 16\) is due"):
        inject(nn.ModuleDict({"blocks": model["blocks"]}), config, initial=initial)


def test_a_part_that_matches_nothing_is_refused(model):
    del model["emb"]
    with pytest.raises(UserError, match="--train_parts emb matches no parameter"):
        inject(model, AdapterConfig(rank=8, train_parts=("emb",)), family=RWKV6)


def test_no_target_at_all_is_refused(model):
    with pytest.raises(UserError, match="att.key"):
        inject(model, AdapterConfig(rank=8))


def test_shapes_alone_decide():
    shapes = {"blocks.0.att.key": (64, 64), "blocks.0.ffn.key": (224, 64), "head": (100, 64)}
    config = AdapterConfig(rank=32, targets=("att.key", "ffn.key"))
    assert check_adapter(config, shapes) == ("blocks.0.att.key", "blocks.0.ffn.key")
    with pytest.raises(UserError, match="64 does not divide 224 at blocks.0.ffn.key"):
        check_adapter(AdapterConfig(rank=64, targets=("att.key", "ffn.key")), shapes)
