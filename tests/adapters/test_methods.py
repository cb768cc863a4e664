"""The methods one by one: their starts and gradients against the formulas of their papers or Hugging Face peft's
layers, and constants, which nothing may change."""

import hashlib
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adapters.layers import merged_weight
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.methods import METHODS, method_of
from rwkv_peft.adapters.product import Frozen
from rwkv_peft.adapters.shira import columns_of
from rwkv_peft.adapters.vera import shared, size
from rwkv_peft.cli.errors import UserError

SCALED, VERA = METHODS["bat-in-scaled"], METHODS["vera"]


def initial_factors(weight, config, gradient=None):
    """(A0, B0) of a method."""
    factors = method_of(config).held.make(weight, config, gradient)
    return factors["init_lora_A"], factors["init_lora_B"]


@pytest.fixture
def weight():
    return torch.randn(20, 12, generator=torch.Generator().manual_seed(0))


def test_pissa_takes_the_principal_part(weight, adapter_config):
    config = adapter_config("pissa", svd_niter=0)
    a, b = initial_factors(weight, config)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(method_of(config).scale(config) * b @ a, u[:, :4] * s[:4] @ vt[:4])
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))


def test_randomized_pissa_comes_close_and_repeats(weight, adapter_config):
    config = adapter_config("pissa", svd_niter=16)
    exact = initial_factors(weight, adapter_config("pissa", svd_niter=0))
    fast = initial_factors(weight, config)
    torch.testing.assert_close(fast[1] @ fast[0], exact[1] @ exact[0], rtol=0, atol=1e-3)
    torch.manual_seed(5)
    assert all(torch.equal(x, y) for x, y in zip(fast, initial_factors(weight, config)))


def test_olora_takes_the_first_rows_of_a_qr(weight, adapter_config):
    a, b = initial_factors(weight, adapter_config("olora"))
    torch.testing.assert_close(b.t() @ b, torch.eye(4))
    torch.testing.assert_close((b @ a)[:, :4], weight[:, :4])
    assert torch.equal(a[:, :4], a[:, :4].triu())


def test_lora_ga_takes_the_gradients_directions(weight, adapter_config):
    a, b = initial_factors(weight, adapter_config("lora-ga"), gradient=weight)
    u, _, vt = torch.linalg.svd(weight, full_matrices=False)
    scale = 20**0.25 / 16**0.5
    torch.testing.assert_close((a @ vt[:4].t()).abs(), scale * torch.eye(4), rtol=0, atol=1e-3)
    torch.testing.assert_close((b.t() @ u[:, 4:8]).abs(), scale * torch.eye(4), rtol=0, atol=1e-3)


def test_lora_ga_without_gradients_is_refused(adapter_config):
    with pytest.raises(UserError, match="gradient"):
        inject(nn.ModuleDict({"layer": nn.Linear(12, 20)}), adapter_config("lora-ga"))


def test_a_residual_adapter_goes_on_from_the_factors_of_a_file(adapter_config):
    """The base is rebuilt from the file's factors, because a decomposition here may give others."""
    base = nn.Linear(12, 20, bias=False)
    shared = base.weight.detach()
    original = shared.clone()
    factors = {"layer.init_lora_A": torch.randn(4, 12), "layer.init_lora_B": torch.randn(20, 4)}
    model = nn.ModuleDict({"layer": base})
    inject(model, adapter_config("pissa"), initial=factors)
    expected = original - 2.0 * factors["layer.init_lora_B"] @ factors["layer.init_lora_A"]
    torch.testing.assert_close(model["layer"].weight, expected)
    assert torch.equal(shared, original)  # the base's own tensor is left as it was
    with pytest.raises(UserError, match="init_lora_A"):
        inject(nn.ModuleDict({"layer": nn.Linear(12, 20)}), adapter_config("pissa"), initial={"else": torch.ones(1)})


def test_dropout_drops_in_training_alone(adapt):
    layer = adapt(nn.Linear(12, 20), "lora", dropout=0.5)
    x = torch.randn(8, 12)
    expected = F.linear(x, merged_weight(layer), layer.bias)
    torch.testing.assert_close(layer.eval()(x), expected)
    layer.train()
    assert not torch.allclose(layer(x), expected)
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.25)


def tensors(dtype=torch.float64, std=0.3):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 24, dtype=dtype), torch.randn(16, 24, dtype=dtype)
    params = {"lora_A": std * torch.randn(4, 24, dtype=dtype), "lora_B": std * torch.randn(16, 4, dtype=dtype)}
    params |= {"lora_gain": std * torch.randn(16, dtype=dtype), "lora_row_norm": weight.norm(dim=1)}
    return x, weight, params, torch.randn(16, dtype=dtype)


def paper(x, weight, params, bias, scale):
    """Magnitude times direction, the length of the direction detached (section 4.3)."""
    turned = weight + scale * params["lora_B"] @ params["lora_A"]
    magnitude = params["lora_row_norm"] * (1 + params["lora_gain"])
    return F.linear(x, (magnitude / turned.norm(dim=1).detach())[:, None] * turned, bias)


def run(function, x, params, *rest):
    x = x.clone().requires_grad_()
    params = {name: tensor.clone().requires_grad_(name != "lora_row_norm") for name, tensor in params.items()}
    y = function(x, params, *rest)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(y.dtype))
    return [y.detach(), x.grad, *(params[name].grad for name in METHODS["dora"].parameters)]


@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_the_papers(with_bias):
    x, weight, params, bias = tensors()
    bias = bias if with_bias else None
    found = run(lambda x, p: METHODS["dora"].apply(x, Frozen(weight, bias), p, 0.5, 0.0), x, params)
    for ours, theirs in zip(found, run(lambda x, p: paper(x, weight, p, bias, 0.5), x, params)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # lengths are computed in float32


def test_a_small_gain_counts_in_bfloat16():
    """A magnitude of 1.0001 would be rounded to 1."""
    x, weight, params, _ = tensors(torch.float32, std=0.0)
    params = {name: tensor.bfloat16() for name, tensor in params.items()}
    plain = METHODS["dora"].apply(x, Frozen(weight), params, 1.0, 0.0)
    params["lora_gain"] = torch.full((16,), 1e-4, dtype=torch.bfloat16)
    change = METHODS["dora"].apply(x, Frozen(weight), params, 1.0, 0.0) / plain - 1
    torch.testing.assert_close(change, torch.full_like(plain, 1e-4), rtol=1e-2, atol=0)


def test_a_row_of_zeros_stays_one(adapter_config):
    base = nn.Linear(8, 4, bias=False)
    base.weight.data[1] = 0
    inject(model := nn.ModuleDict({"layer": base}), adapter_config("dora", rank=2))
    y = model["layer"](torch.randn(3, 8))
    assert torch.isfinite(y).all() and not y[:, 1].any()


def test_rslora_divides_by_the_root_of_the_rank(adapter_config):
    assert METHODS["rslora"].scale(adapter_config("rslora", rank=16, alpha=8.0)) == 2.0
    assert METHODS["rslora"].alpha.alpha(2.0, 16) == 8.0


def a_layer(std=0.1, in_features=24, out_features=16):
    layer = nn.Linear(in_features, out_features, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("std", [3e-3, 0.1, 40.0])
def test_the_terms_of_a_step_have_one_size(rank, std, adapter_config):
    weight = a_layer(std, 128, 96).weight.detach()
    scale = SCALED.held.make(weight, adapter_config("bat-in-scaled", rank=rank), None)["bone_scale"]
    assert scale.item() == pytest.approx(1 / (weight.square().mean().sqrt().item() * math.sqrt(rank)), rel=2**-8)
    step = torch.randn(128 // rank, rank, rank).sign()
    change, addend = (
        SCALED.change.delta(w, {"bone": step, "bone_scale": scale}) for w in (weight, torch.zeros_like(weight))
    )
    assert [t.square().mean().sqrt().item() for t in (change - addend, addend)] == pytest.approx([1, 1], rel=0.05)


def test_a_weight_of_zeros_has_the_scale_1(adapt):
    layer = a_layer(std=0.0)
    adapted = adapt(layer, "bat-in-scaled")
    assert adapted.bone_scale.tolist() == [1.0] and adapted.scale == 1
    x = torch.randn(5, 24)
    torch.testing.assert_close(adapted(x), x @ merged_weight(adapted).t())


def test_no_cast_of_the_model_changes_the_scale(adapt):
    layer = adapt(a_layer(), "bat-in-scaled")
    told, number = layer.bone_scale.clone(), layer.scale
    layer.bfloat16()
    assert layer.bone_scale.float().equal(told) and told.item() == layer.scale == number


def test_layers_of_different_scales_share_what_torch_compile_makes(adapt):
    torch._dynamo.reset()
    x = torch.randn(5, 24, requires_grad=True)
    for std in (0.1, 0.2, 0.3):
        layer = adapt(a_layer(std), "bat-in-scaled")
        expected = layer(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            layer.compile(backend="aot_eager", fullgraph=True)
            y = layer(x)
        torch.testing.assert_close(y, expected)
        for found, true in zip(*(torch.autograd.grad(t.square().sum(), (x, layer.bone)) for t in (y, expected))):
            torch.testing.assert_close(found, true)


@pytest.mark.parametrize("scale", [0.0, -2.0, math.inf, math.nan])
def test_a_scale_that_nothing_can_be_divided_by_is_refused(scale, adapter_config):
    initial = {"layer.bone_scale": torch.tensor([scale])}
    with pytest.raises(UserError, match=f"a bone_scale of {scale:g}, .* copy it again"):
        inject(nn.ModuleDict({"layer": a_layer()}), adapter_config("bat-in-scaled"), initial=initial)
    with pytest.raises(UserError, match="a finite number above 0"):
        SCALED.change.opposite({"bone": torch.zeros(6, 4, 4), "bone_scale": torch.tensor([scale])})


def gradients(y, *inputs):
    return torch.autograd.grad(y, inputs, torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))


def test_veras_values_and_gradients_are_those_of_pefts_layer(adapt):
    """Of one size, at which both share the same matrices; peft has no c, which goes into its B."""
    peft = pytest.importorskip("peft")
    layer = adapt(nn.Linear(24, 16).double(), "vera", d_initial=0.3, init_seed=5)
    base = nn.Linear(24, 16).double()
    base.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    config = peft.VeraConfig(r=4, d_initial=0.3, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    b, d = theirs.vera_lambda_b["default"], theirs.vera_lambda_d["default"]
    assert torch.equal(d, torch.full((4,), 0.3).to(d.dtype)) and not b.any()
    with torch.no_grad():
        b.data, d.data = layer.vera_b.detach().clone(), layer.vera_d.detach().clone()
        theirs.vera_A["default"] = layer.vera_A.t().clone()
        theirs.vera_B["default"] = size(4, 24) * layer.vera_B
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    ours, expected = layer(x), theirs(x)
    torch.testing.assert_close(ours, expected)
    found = gradients(ours, x, layer.vera_b, layer.vera_d)
    for one, other in zip(found, gradients(expected, x, b, d)):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(merged_weight(layer) - layer.weight.float(), theirs.get_delta_weight("default").float())


def test_layers_of_all_widths_share_their_matrices(adapter_config):
    model = nn.ModuleDict({"layer": nn.Linear(24, 16), "other": nn.ModuleDict({"layer": nn.Linear(32, 40)})})
    inject(model, adapter_config("vera", rank=8, init_seed=3))
    small, large = model["layer"], model["other"]["layer"]
    assert torch.equal(large.vera_A[:24], small.vera_A) and torch.equal(large.vera_B[:16], small.vera_B)
    assert small.vera_A.min() >= -1 and small.vera_A.max() <= 1
    inject(again := nn.ModuleDict({"layer": nn.Linear(24, 16)}), adapter_config("vera", rank=8, init_seed=4))
    assert not torch.equal(again["layer"].vera_A, small.vera_A)


def test_a_seed_means_the_same_matrix_in_every_version():
    drawn = shared(7, 0, 64, 16, torch.float32)[:64]
    digest = hashlib.sha256(drawn.numpy().tobytes()).hexdigest()[:16]
    assert digest == "3d930ca996bf3e2e"


def test_the_matrices_have_the_size_of_kaiming_initialization():
    rank, width = 256, 1024
    A, B = (shared(0, axis, width, rank, torch.float64)[:width] for axis in (1, 0))
    change = size(rank, width) * (B @ A.t())
    assert change.square().mean().sqrt().item() == pytest.approx((2 / width * 2 / rank * rank) ** 0.5, rel=0.02)


def test_no_cast_of_the_model_changes_the_matrices_or_the_seed(adapt):
    layer = adapt(nn.Linear(24, 16), "vera", init_seed=255)
    told = merged_weight(layer)
    layer.vera_b.data, layer.vera_d.data = layer.vera_b.bfloat16().float(), layer.vera_d.bfloat16().float()
    told = merged_weight(layer) - layer.weight
    layer.bfloat16()
    weight = torch.zeros(16, 24)
    params = {name: tensor.detach() for name, tensor in layer.params.items()}
    torch.testing.assert_close(VERA.change.delta(weight, params), told, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", [-1.0, 0.5, 256.0, float("nan"), float("inf")])
@pytest.mark.parametrize("variant", ["vera", "shira"])
def test_a_seed_that_is_none_is_refused(seed, variant, adapter_config):
    initial = {f"layer.{variant}_seed": torch.tensor([seed])}
    with pytest.raises(UserError, match="a whole number from 0 to 255 is due; the file is damaged"):
        inject(nn.ModuleDict({"layer": nn.Linear(24, 16)}), adapter_config(variant), initial=initial)


@pytest.mark.parametrize(
    "variant, settings, words",
    [
        ("vera", {"init_seed": 256}, "vera_seed 256: a seed is a whole number from 0 to 255"),
        ("vera", {"d_initial": 0.0}, "d_initial 0.0: b would never move"),
        ("shira", {"entries": 0}, "entries 0: at least one entry"),
        ("shira", {"entries": 25}, "entries in --peft_config 25 is more than the 24 entries of a row at layer"),
        ("bone", {"d_initial": 0.5}, "d_initial 0.5 belongs to --peft vera, and --peft is bone"),
    ],
)
def test_settings_that_make_no_sense_are_refused(variant, settings, words, adapter_config):
    with pytest.raises(UserError) as error:
        inject(nn.ModuleDict({"layer": nn.Linear(24, 16)}), adapter_config(variant, **settings))
    assert words in str(error.value)


def test_shiras_values_and_gradients_are_those_of_pefts_layer(adapt):
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
