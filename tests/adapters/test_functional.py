"""The evaluations without a merged weight equal the merged one: values, gradients, and what they keep."""

from functools import partial
from types import MappingProxyType

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rwkv_peft.adapters.functions import bat_in, bat_out, bone, lora
from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.adapters.product import Frozen
from rwkv_peft.ops import bone as bone_op

RANK = 4


# variant -> how to call it on (x, weight, params, bias)
FUNCTIONS = MappingProxyType(
    {
        "bat-in": lambda x, w, p, b: bat_in.bat_in(x, Frozen(w, b), p["bone"]),
        "bat-out": lambda x, w, p, b: bat_out.bat_out(x, Frozen(w, b), p["bone"], "weight"),
        "bat-out by activations": lambda x, w, p, b: bat_out.bat_out(x, Frozen(w, b), p["bone"], "activation"),
        "bone": lambda x, w, p, b: bone.bone(x, Frozen(w, b), p["bone"]),
        "bone-mini": lambda x, w, p, b: bone.bone(x, Frozen(w, b), p["bone"]),
        "bone-signed": lambda x, w, p, b: METHODS["bone-signed"].apply(x, Frozen(w, b), p, 1.0, 0.0),
        "lora": lambda x, w, p, b: lora.lora(x, Frozen(w, b), p["lora_A"], p["lora_B"], 0.5),
    }
)


def variant_of(name):
    return name.split(" ")[0]


def shapes(name, in_features, out_features):
    """Shapes of a variant's parameters."""
    rank = RANK
    return {
        "bat-in": {"bone": (in_features // rank, rank, rank)},
        "bat-out": {"bone": (out_features // rank, rank, rank)},
        "bone": {"bone": (rank, out_features)},
        "bone-mini": {"bone": (rank, 2)},
        "bone-signed": {"bone": (rank, out_features), "bone_signs": (in_features,)},
        "lora": {"lora_A": (rank, in_features), "lora_B": (out_features, rank)},
    }[variant_of(name)]


def tensors(name, lead=(2, 5), in_features=24, out_features=16, dtype=torch.float64, std=0.3):
    torch.manual_seed(0)
    x = torch.randn(*lead, in_features, dtype=dtype)
    weight = torch.randn(out_features, in_features, dtype=dtype) / in_features**0.5
    params = {k: std * torch.randn(s, dtype=dtype) for k, s in shapes(name, in_features, out_features).items()}
    return x, weight, params, torch.randn(out_features, dtype=dtype)


def plain(name, x, weight, params, bias):
    """The definition: one linear layer with the merged weight."""
    change = METHODS[variant_of(name)].change.delta(weight, params, scale=0.5)
    return F.linear(x, weight + change, bias)


def run(function, x, weight, params, bias, train=("x", "params")):
    """y and the gradients of what trains, for a fixed gradient of y."""
    x = x.detach().clone().requires_grad_("x" in train)
    weight = weight.detach().clone().requires_grad_("weight" in train)
    params = {k: p.detach().clone().requires_grad_("params" in train) for k, p in params.items()}
    bias = None if bias is None else bias.detach().clone().requires_grad_("bias" in train)
    y = function(x, weight, params, bias)
    if y.requires_grad:
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype))
    return [y.detach()] + [t.grad for t in (x, weight, *params.values(), bias) if t is not None and t.requires_grad]


def test_every_way_to_compute_is_held_to_the_merged_weight():
    """A method's own, or that of a method here; dora's is held to the paper's gradients."""
    held = {METHODS[variant_of(name)].apply for name in FUNCTIONS}
    assert {name for name, method in METHODS.items() if method.apply not in held} == {"dora"}


def assert_close(results, references, tolerance):
    assert len(results) == len(references)
    for result, reference in zip(results, references):
        error = (result.double() - reference.double()).abs().max() if result.numel() else 0.0
        assert result.shape == reference.shape
        assert error <= tolerance * max(1e-300, reference.abs().max() if reference.numel() else 0), error


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "lead, sizes",
    [
        *(((), (24, 16)), ((1,), (16, 24)), ((7,), (16, 16)), ((2, 5), (4, 4))),
        *(((2, 3, 4), (16, 24)), ((130,), (24, 16)), ((2, 5), (24, 16))),
    ],
    ids=str,
)
@pytest.mark.processor
def test_values_and_gradients_equal_the_merged_weights(name, lead, sizes):
    inputs = tensors(name, lead, *sizes)
    train = ("x", "weight", "params", "bias")
    assert_close(run(FUNCTIONS[name], *inputs, train), run(partial(plain, name), *inputs, train), 1e-12)


@pytest.mark.parametrize("in_features", [3, 5, 22, 23])
@pytest.mark.parametrize("name", ["bone", "bone-mini", "bone-signed"])
def test_bone_pads_inputs_that_rank_does_not_divide(name, in_features):
    inputs = tensors(name, in_features=in_features)
    train = ("x", "weight", "params")
    assert_close(run(FUNCTIONS[name], *inputs, train), run(partial(plain, name), *inputs, train), 1e-12)


@pytest.mark.parametrize(
    "train", [("x",), ("params",), ("weight",), ("x", "params"), ("weight", "params"), ("bias",)], ids="+".join
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_subset_may_train(name, train):
    inputs = tensors(name)
    assert_close(run(FUNCTIONS[name], *inputs, train), run(partial(plain, name), *inputs, train), 1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_bias_an_empty_batch_and_a_transposed_batch(name):
    x, weight, params, _ = tensors(name)
    for batch in (x, x[:0], x.transpose(0, 1), x[:, ::2]):
        function, reference = FUNCTIONS[name], partial(plain, name)
        assert_close(run(function, batch, weight, params, None), run(reference, batch, weight, params, None), 1e-12)
        views = (batch, weight, params, None)
        assert_close([function(*views)], [reference(*views)], 1e-12)  # not cloned, hence strided


@pytest.mark.parametrize("name", FUNCTIONS)
def test_many_chunks_equal_one(name, monkeypatch):
    """Loops over tokens and over output blocks, here of one to a few steps, do not change the result."""
    monkeypatch.setattr(bat_out, "CHUNK_ELEMENTS", 2 * RANK * 24)
    monkeypatch.setattr(bone_op, "_token_chunks", lambda x: [slice(i, i + 3) for i in range(0, x.shape[0], 3)])
    inputs = tensors(name)
    train = ("x", "weight", "params")
    assert_close(run(FUNCTIONS[name], *inputs, train), run(partial(plain, name), *inputs, train), 1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name):
    x, weight, params, bias = tensors(name, lead=(3,), in_features=8, out_features=8)
    names = list(params)

    def function(x, weight, bias, *values):
        return FUNCTIONS[name](x, weight, dict(zip(names, values)), bias)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (x, weight, bias, *params.values())])


@pytest.mark.parametrize("std", [0.3, 0.01])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.processor
def test_bfloat16_errs_no_more_than_twice_plain_bfloat16(name, std):
    inputs = tensors(name, lead=(64,), in_features=96, out_features=64, std=std)
    low = [{k: p.bfloat16() for k, p in i.items()} if isinstance(i, dict) else i.bfloat16() for i in inputs]
    exact = [{k: p.double() for k, p in i.items()} if isinstance(i, dict) else i.double() for i in low]
    truth = run(partial(plain, name), *exact)
    for ours, theirs, true in zip(run(FUNCTIONS[name], *low), run(partial(plain, name), *low), truth):
        assert (ours.double() - true).norm() <= 2 * (theirs.double() - true).norm()


def saved_tensors(function):
    """The tensors that autograd keeps between forward and backward, one for each storage."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    del y
    return saved


@pytest.mark.parametrize("name", FUNCTIONS)
def test_saves_activations_and_no_copy_of_a_weight(name):
    """x is (T, in) and S (T, rank); the weight and the parameters are there anyway."""
    x, weight, params, bias = tensors(name, lead=(10,), in_features=48, out_features=64, dtype=torch.float32)
    x.requires_grad_()
    params = {k: p.requires_grad_(k != "bone_signs") for k, p in params.items()}
    saved = saved_tensors(lambda: FUNCTIONS[name](x, weight, params, bias))
    for owned in (weight, *params.values()):
        saved.pop(owned.untyped_storage().data_ptr(), None)
    elements = sum(tensor.numel() for tensor in saved.values())
    expected = {"bone": 10 * RANK, "bone-mini": 10 * RANK, "lora": 10 * (48 + RANK)}
    expected["bone-signed"] = 10 * RANK + RANK * 48  # and its sketch
    assert elements == expected.get(name, 10 * 48)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.processor
def test_autocast_computes_low_and_keeps_no_cast_weight(name):
    x, weight, params, bias = tensors(name, lead=(10,), in_features=48, out_features=64, dtype=torch.float32)
    x.requires_grad_()
    params = {k: p.requires_grad_() for k, p in params.items()}
    with torch.autocast("cpu", torch.bfloat16):
        saved = saved_tensors(lambda: FUNCTIONS[name](x, weight, params, bias))
        y = FUNCTIONS[name](x, weight, params, bias)
    assert y.dtype == torch.bfloat16
    saved.pop(weight.untyped_storage().data_ptr())
    assert all(tensor.numel() < weight.numel() for tensor in saved.values())
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    for parameter in params.values():
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.processor
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    inputs = tensors(name)

    def checkpointed(x, weight, params, bias):
        names = list(params)
        call = lambda x, *values: FUNCTIONS[name](x, weight, dict(zip(names, values)), bias)  # noqa: E731
        return checkpoint(call, x, *params.values(), use_reentrant=reentrant)

    for ours, direct in zip(run(checkpointed, *inputs), run(FUNCTIONS[name], *inputs)):
        assert torch.equal(ours, direct)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_backward_reads_the_weights_current_storage(name):
    """ZeRO-3 frees a parameter's storage after forward and fills another before backward."""
    x, weight, params, _ = tensors(name)
    reference = run(FUNCTIONS[name], x, weight, params, None)
    parameter = torch.nn.Parameter(weight.clone(), requires_grad=False)
    x = x.clone().requires_grad_()
    params = {k: p.clone().requires_grad_() for k, p in params.items()}
    y = FUNCTIONS[name](x, parameter, params, None)
    parameter.data = torch.empty(0, dtype=weight.dtype)
    parameter.data = weight.clone()
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    assert_close([y.detach(), x.grad, *(p.grad for p in params.values())], reference, 0)


@pytest.mark.parametrize("tokens, side", [(1, "activation"), (2, "weight"), (100, "weight")])
def test_bat_out_takes_the_cheaper_side(tokens, side):
    x, weight, params, _ = tensors("bat-out", lead=(tokens,))
    chosen = bat_out.bat_out(x, Frozen(weight), params["bone"])
    assert torch.equal(chosen, bat_out.bat_out(x, Frozen(weight), params["bone"], side))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_into_one_graph(name):
    inputs = tensors(name)
    compiled = torch.compile(FUNCTIONS[name], backend="aot_eager", fullgraph=True)
    assert_close(run(compiled, *inputs), run(FUNCTIONS[name], *inputs), 1e-12)
