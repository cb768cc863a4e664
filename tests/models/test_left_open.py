"""A model whose norms add what the adapters before them leave, as on a GPU, computes what it does where each layer is
whole: logits, states and all gradients; and who leaves what, and when."""

import copy

import pytest
import torch

from cuda_shim import shim
from models.test_residuals import model_of, step
from rwkv_peft.adapters import layer as adapter_layer
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.layer import AdapterLinear
from rwkv_peft.adapters.methods import METHODS, words_of
from rwkv_peft.config import AdapterConfig
from rwkv_peft.models import FAMILIES
from rwkv_peft.ops import adding
from rwkv_peft.ops.bone import cuda as bone_cuda
from rwkv_peft.ops.bone import op as bone_op
from rwkv_peft.ops.mix import cpu, gpu_lerp, op
from rwkv_peft.ops.mix import cuda as mix_cuda

LAYERS = {"x060": ("att.output", "ffn.receptance", "ffn.value"), "x070": ("ffn.value",)}


@pytest.fixture
def left(monkeypatch):
    """What leaves something does so, as on a GPU -> the layers that did, in their order."""
    layers, unshifted = [], AdapterLinear.unshifted

    def recorded(layer, *given, **more):
        layers.append(layer)
        return unshifted(layer, *given, **more)

    monkeypatch.setattr(AdapterLinear, "before_norm", lambda self, x: self.method.before_norm is not None)
    monkeypatch.setattr(AdapterLinear, "unshifted", recorded)
    return layers


@pytest.mark.parametrize("around_square", (False, True))
@pytest.mark.parametrize("inside", (False, True), ids=("added", "inside"))
@pytest.mark.parametrize("checkpoint", (False, True))
@pytest.mark.parametrize("lengths", [None, (3, 1, 8)], ids=("rows", "packed"))
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_step_is_the_same(family, lengths, checkpoint, inside, around_square, request, monkeypatch):
    """With products that add residuals themselves, too, and layers around the square that leave a part to that."""
    model = model_of(family, "bone", checkpoint, "bat-in")
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.arange(12).view(2, 6) if lengths is None else torch.arange(12)[None]
    expected = step(model, tokens, bounds)
    layers = request.getfixturevalue("left")
    if inside:
        monkeypatch.setattr(adding, "inside_product", lambda *_: True)
    if around_square:
        monkeypatch.setattr(AdapterLinear, "around_square", lambda self, *_: self.method.around_square is not None)
    found = step(model, tokens, bounds)
    names = {id(module): name for name, module in model.named_modules()}
    inner = [f"blocks.{i}.{name}" for i in range(2) for name in LAYERS[family.version]]
    whole = [name for name in inner if ".ffn." in name and (checkpoint or name.startswith("blocks.1"))]
    assert sorted({names[id(layer)] for layer in layers}) == sorted(set(inner) - set(whole))
    for x, true in zip(found, expected, strict=True):
        torch.testing.assert_close(x, true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trained, remain", [("ln2.weight", "ffn"), ("ln1.bias", "att.output"), ("none", "both")])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_trained_norms_are_given_the_whole(family, trained, remain, left):
    model = model_of(family, "bone", False, "bat-in")
    for name, parameter in model.named_parameters():
        if name.endswith(trained):
            parameter.requires_grad_(True)
    step(model, torch.arange(12).view(2, 6), None)
    names = {id(module): name for name, module in model.named_modules()}
    found = {names[id(layer)].partition(".")[2].partition(".")[2] for layer in left}
    assert found == {name for name in LAYERS[family.version] if remain == "both" or name.startswith(remain)}


def on_shims(patch):
    """bfloat16 tensors go through the CUDA kernels of mix and bone, on the CPU -> the names of mix's launches."""
    mix, bone, launched = shim.build(mix_cuda.FAMILY), shim.build(bone_cuda.FAMILY), []

    def call(name, like, tensors, **sizes):
        launched.append((name, {key for key, x in tensors.items() if x is not None}))
        (mix_cuda.launch_tiled if name in mix_cuda.TILED else mix_cuda.launch)(mix, None, name, like, tensors, **sizes)

    patch.setattr(cpu, "call", call)
    patch.setattr(op, "cpu_lerp", gpu_lerp)
    patch.setattr(op, "fused_on_gpu", op.fused)
    patch.setattr(bone_cuda, "call", lambda *rest, **sizes: bone_cuda.launch(bone, None, *rest, **sizes))
    patch.setattr(bone_op, "backend", lambda first, *_, **__: bone_cuda if first.dtype == torch.bfloat16 else None)
    patch.setattr(adding, "inside_product", lambda *_: True)
    return launched


@pytest.mark.parametrize("mode", ("bat-in", "bat-in-scaled"))
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_model_on_a_gpus_kernels(family, mode, monkeypatch):
    """Logits, states and all gradients in bfloat16, at most twice as far from float64 as where layers leave nothing."""
    model = model_of(family, "bone", False, mode, rank=16)
    tokens = torch.arange(70).view(2, 35) % 40
    model.bfloat16()
    true = step(copy.deepcopy(model).double(), tokens, None)
    launched = on_shims(monkeypatch)
    found = step(model, tokens, None)
    lefts = [key for name, keys in launched if "norm_lerp_forward" in name for key in sorted(keys) if "left" in key]
    assert lefts == {"x060": ["left_x", "left_gate", "left_y", "left_x"], "x070": ["left_x"]}[family.version]
    monkeypatch.setattr(adapter_layer, "takes_left", lambda *_: False)
    apart = step(model, tokens, None)
    for i, (x, low, exact) in enumerate(zip(found, apart, true, strict=True)):
        assert (x.double() - exact).norm() <= 2 * (low.double() - exact).norm(), i


@pytest.mark.parametrize("variant", METHODS)
def test_a_gpu_takes_the_methods_that_have_the_form(variant):
    """Of the ranks that its kernels have; tensors without data stand for a GPU's."""
    for rank, takes in ((16, True), (4, False)):
        layer = torch.nn.ModuleDict({"layer": torch.nn.Linear(64, 96, bias=False)})
        config = AdapterConfig(**words_of(METHODS[variant]), rank=rank, mini_rank=rank, targets=("layer",))
        inject(layer, config, gradients={"layer": torch.randn(96, 64)})
        for dtype in (torch.float32, torch.bfloat16):
            x, adapted = torch.empty(1, 3, 64, dtype=dtype, device="meta"), layer.to("meta", dtype)["layer"]
            assert adapted.before_norm(x) == (takes and METHODS[variant].before_norm is not None)
        assert not adapted.before_norm(torch.empty(1, 3, 64))
        adapted.untrained = True
        assert not adapted.before_norm(x)
