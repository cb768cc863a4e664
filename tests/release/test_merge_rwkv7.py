"""Files of RWKV-PEFT's RWKV-7 runs on an RWKV-7 base: merge_bone.py writes what the formulas say in float64."""

import pytest
import torch

from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models import family_named
from rwkv_peft.models.rwkv7.keys import new_dimensions, shapes
from rwkv_peft.release.merge import main as merge

RANK, ALPHA = 8, 24
LAYERS = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")


@pytest.fixture(scope="module")
def base():
    """{key: tensor} of a random RWKV-7 in float32, without the value residual of its first layer, as some releases."""
    config = new_dimensions(n_layer=2, n_embd=32, vocab_size=40, head_size=8, dim_ffn=48)
    generator = torch.Generator().manual_seed(0)
    unused = tuple(f"blocks.0.att.v{n}" for n in "012")
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes(config).items() if key not in unused}


@pytest.fixture
def merged(base, tmp_path):
    """(name of the adapter in tmp_path, flags) -> {key: tensor} of the file that merge_bone.py writes."""
    save_model(tmp_path / "base.pth", base)

    def run(adapter, *flags):
        argv = ["--base_model", tmp_path / "base.pth", "--bone_checkpoint", tmp_path / adapter]
        assert merge([str(word) for word in (*argv, "--output", tmp_path / "merged.pth", *flags)]) == 0
        return open_base(tmp_path / "merged.pth").tensors

    return run


def lora(weight, A, B):
    return weight + ALPHA / RANK * B @ A


def pissa(weight, A, B, A0, B0):
    return weight - B0 @ A0 + B @ A


def miss(weight, D):
    """W'[o, i] = W[o, i] + D[i mod r, o]."""
    return weight + D[torch.arange(weight.shape[1]) % len(D)].T


def mini(weight, D):
    """The same with D's columns repeated along the output."""
    return miss(weight, D.repeat(1, weight.shape[0] // D.shape[1]))


def block_affine(weight, blocks, by_input):
    """W'_ab = W_ab + W_ab B + B, with B of the input block b or of the output block a, block by block."""
    r, result = blocks.shape[-1], weight.clone()
    for o in range(0, weight.shape[0], r):
        for i in range(0, weight.shape[1], r):
            block = blocks[(i if by_input else o) // r]
            result[o : o + r, i : i + r] += weight[o : o + r, i : i + r] @ block + block
    return result


# kind -> (shapes of its tensors for a weight (out, in), the formula)
LORA = ({"lora_A": lambda out, into: (RANK, into), "lora_B": lambda out, into: (out, RANK)}, lora)
MISS = ({"D": lambda out, into: (RANK, out)}, miss)
MINI = ({"D": lambda out, into: (RANK, 4)}, mini)
BAT_OUT = ({"D": lambda out, into: (out // RANK, RANK, RANK)}, lambda W, D: block_affine(W, D, by_input=False))
BAT_IN = ({"D": lambda out, into: (into // RANK, RANK, RANK)}, lambda W, D: block_affine(W, D, by_input=True))
PISSA = (LORA[0] | {f"init_{name}": shape for name, shape in LORA[0].items()}, pissa)


def drawn(base, kind):
    """{module: {name: tensor}} of a random adapter on all of a model's linear layers."""
    generator = torch.Generator().manual_seed(1)
    return {
        f"blocks.{i}.{layer}": {
            name: 0.1 * torch.randn(shape(*base[f"blocks.{i}.{layer}.weight"].shape), generator=generator)
            for name, shape in kind[0].items()
        }
        for i in range(2)
        for layer in LAYERS
    }


def check(base, merged, kind, adapter, whole=None):
    """Assert that merged is the formula's result, computed in float64, and the base elsewhere."""
    assert list(merged) == list(base)
    for key, tensor in merged.items():
        expected = (whole or {}).get(key, base[key]).double()
        if (module := key.removesuffix(".weight")) in adapter:
            expected = kind[1](expected, *(tensor.double() for tensor in adapter[module].values()))
            assert not torch.equal(tensor, base[key])
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("init", [None, True, "bat", "mini"])
def test_what_peft_itself_trains_and_saves(base, merged, tmp_path, init):
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "MissConfig"):
        pytest.skip("this peft has no MissConfig")
    targets = ["receptance", "key", "value", "output"]  # as RWKV-PEFT names them
    if init is None:
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    else:
        config = peft.MissConfig(r=RANK, mini_r=4, init_weights=init, target_modules=targets)
    family = family_named("x070")
    wrapped = peft.get_peft_model(family.load(dict(base), family.config_of(base)), config)
    adapter, generator = {}, torch.Generator().manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
            module = name.removeprefix("base_model.model.").split(".lora_")[0].split(".miss_")[0]
            adapter.setdefault(module, {})[name] = parameter.data
    assert len(adapter) == 2 * len(LAYERS)
    wrapped.save_pretrained(tmp_path / "run-adapter")
    check(base, merged("run-adapter"), {None: LORA, True: MISS, "bat": BAT_OUT, "mini": MINI}[init], adapter)


@pytest.mark.parametrize(
    "kind, parameter, flags",
    [
        (LORA, None, ("--lora_alpha", ALPHA)),
        (MISS, "disha", ()),
        (MISS, "bone", ()),
        (BAT_IN, "disha", ()),
        (BAT_IN, "bone", ()),
        (BAT_OUT, "bone", ()),
    ],
)
def test_flat_files_with_whole_tensors_beside_them(base, merged, tmp_path, kind, parameter, flags):
    adapter = drawn(base, kind)
    whole = {key: tensor + 1 for key, tensor in base.items() if ".att.x_" in key or key.endswith(("w1", "ln1.weight"))}
    tensors = {
        f"{module}.{parameter or name}": tensor for module, params in adapter.items() for name, tensor in params.items()
    }
    torch.save(tensors | whole, tmp_path / "rwkv-1.pth")
    check(base, merged("rwkv-1.pth", *flags), kind, adapter, whole)


def test_pissa_with_its_init_file(base, merged, tmp_path):
    adapter = drawn(base, PISSA)
    flat = {f"{module}.{name}": tensor for module, params in adapter.items() for name, tensor in params.items()}
    torch.save({key: tensor for key, tensor in flat.items() if ".init_" not in key}, tmp_path / "rwkv-1.pth")
    initial = {f"model.{key}": tensor for key, tensor in flat.items() if ".init_" in key}
    torch.save(initial, tmp_path / "init_pissa.pth")
    check(base, merged("rwkv-1.pth", "--lora_init", tmp_path / "init_pissa.pth"), PISSA, adapter)


def test_states_are_added_as_they_lie(base, merged, tmp_path):
    states = {f"blocks.{i}.att.time_state": torch.randn(4, 8, 8) for i in range(2)}
    torch.save(states, tmp_path / "rwkv-1.pth")
    found = merged("rwkv-1.pth")
    assert list(found) == [*base, *states] and all(torch.equal(found[key], states[key]) for key in states)


@pytest.mark.parametrize(
    "layer, message",
    [
        ("att.gate", "no blocks.0.att.gate.weight, .* att.gate is a layer of RWKV-6, and the base is an RWKV-7"),
        ("ffn.receptance", "ffn.receptance is a layer of RWKV-6"),
        ("att.other", "other names or of more layers"),
    ],
)
def test_an_adapter_of_rwkv6_has_no_place(base, merged, tmp_path, layer, message):
    torch.save({f"blocks.{i}.{layer}.disha": torch.ones(RANK, 32) for i in range(2)}, tmp_path / "rwkv-1.pth")
    with pytest.raises(UserError, match=message):
        merged("rwkv-1.pth")
    assert not (tmp_path / "merged.pth").exists()
