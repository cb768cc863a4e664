"""Adapters of other tools merge into the model that was trained, on an RWKV-6 and, by the formulas, on an RWKV-7: flat
.pth of RWKV-PEFT, which are written too, and folders of Hugging Face peft and of rwkv_lightning_cuda."""

import json
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from release.merges import RANK, ROOT, TARGETS, adapter_of, convert, run
from rwkv_peft.checkpoints.adapter_file import Adapter
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.base import base_of, open_base, save_model
from rwkv_peft.checkpoints.rwkv_peft_file import write_rwkv_peft
from rwkv_peft.checkpoints.tensors import save_pth
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models import family_named
from rwkv_peft.models.rwkv6.model import RWKV6
from rwkv_peft.models.rwkv7.keys import new_dimensions, shapes
from rwkv_peft.release.merge import merged_tensors
from rwkv_peft.release.merge_command import main as merge
from training.runs import finish, start

ALPHA = 24


def foreign(tensors, rename):
    return {key.replace(".bone", rename): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    "variant, suffix, targets, mode",
    [
        ("bat-in", ".bone", TARGETS, None),
        ("bat-out", ".bone", TARGETS, None),
        ("bat-in", ".bone", ("att.key",), "bat"),
        ("bat-in", ".bone", ("att.key",), "bat-in"),
        ("bat-out", ".bone", ("att.key",), "bat-out"),
        ("bat-in", ".disha", ("att.key",), None),
        ("bone", ".bone", TARGETS, None),
        ("bone", ".disha", TARGETS, None),
        ("oldest", ".bone", TARGETS, None),
    ],
)
def test_flat_files_of_rwkv_peft_merge(folder, variant, suffix, targets, mode):
    base = open_base(folder / "base.pth").tensors
    actual = "bat-out" if variant == "oldest" else variant
    tensors, metadata = adapter_of(actual, base, targets)
    expected = merged_tensors(base_of(base), [("a", Adapter(tensors, metadata))])
    if variant == "oldest":
        tensors = {key: tensor.reshape(-1, RANK) for key, tensor in tensors.items()}
    torch.save(foreign(tensors, suffix), folder / "a.pth")
    merged = run(folder, *(("--bone_mode", mode) if mode else ()), adapter="a.pth")
    assert all(torch.equal(merged[key], expected[key]) for key in base)


def test_lora_and_pissa_files_of_rwkv_peft_merge(folder):
    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of("lora", base)
    torch.save(tensors, folder / "a.pth")
    merged = run(folder, "--lora_alpha", 4, adapter="a.pth")
    expected = merged_tensors(base_of(base), [("a", Adapter(tensors, metadata))])  # scale 4 / 8
    assert all(torch.equal(merged[key], expected[key]) for key in base)

    tensors, metadata = adapter_of("pissa", base, scale=1.0)
    paths = write_rwkv_peft(folder / "p.pth", Adapter(tensors, metadata))
    assert [path.name for path in paths] == ["p.pth", "init_p.pth"]
    merged = run(folder, "--lora_init", folder / "init_p.pth", adapter="p.pth")
    expected = merged_tensors(base_of(base), [("a", Adapter(tensors, metadata))])
    assert all(torch.equal(merged[key], expected[key]) for key in base)
    for flags in ((), ("--lora_alpha", "8")):
        with pytest.raises(UserError, match="p.pth has .*init_p.pth beside it, .*PiSSA.*that file as --lora_init"):
            run(folder, *flags, adapter="p.pth")
    initial = torch.load(folder / "init_p.pth", weights_only=True)
    assert all(key.startswith("model.blocks.") for key in initial)  # as RWKV-PEFT writes it since 2025-02
    torch.save({key.removeprefix("model."): tensor for key, tensor in initial.items()}, folder / "earlier.pth")
    merged = run(folder, "--type", "pissa", "--lora_init", folder / "earlier.pth", adapter="p.pth", output="e.pth")
    assert all(torch.equal(merged[key], expected[key]) for key in base)
    torch.save(dict(list(initial.items())[:-1]), folder / "short.pth")
    with pytest.raises(UserError, match="is not the init file"):
        run(folder, "--lora_init", folder / "short.pth", adapter="p.pth")


SCRIPTS = {  # of RWKV-PEFT -> (the file that it calls, the form of its adapter, its flags beside --base_model)
    "merge_bone.sh": ("merge_bone.py", "bone", "--lora_checkpoint {a} --output {m}"),
    "merge_disha.sh": ("merge_disha.py", "bone", "--peft_checkpoint {a} --output {m}"),
    "merge_lora.sh": ("merge.py", "lora", "--lora_checkpoint {a} --output {m} --type lora --lora_alpha 32"),
    "merge_pissa.sh": ("merge.py", "pissa", "--lora_init {i} --lora_checkpoint {a} --output {m} --type pissa"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_merge_scripts_of_rwkv_peft_run_as_they_are(folder, script):
    name, variant, flags = SCRIPTS[script]
    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of(variant, base, scale=4.0 if variant == "lora" else 1.0)  # 32 / 8
    write_rwkv_peft(folder / "a.pth", Adapter(tensors, metadata))
    paths = {"a": folder / "a.pth", "i": folder / "init_a.pth", "m": folder / "m.pth"}
    argv = [str(ROOT / "merge" / name), "--base_model", str(folder / "base.pth"), *flags.format(**paths).split()]
    finish(start([sys.executable, *argv]))
    merged = open_base(folder / "m.pth").tensors
    expected = merged_tensors(base_of(base), [("a", Adapter(tensors, metadata))])
    assert all(torch.equal(merged[key], expected[key]) for key in base)


@pytest.mark.parametrize("prefix", ["model.", "base_model.model.", "model.base_model.model."])
def test_the_prefix_of_a_wrapper_is_taken_off(folder, prefix):
    base = open_base(folder / "base.pth").tensors
    tensors, _ = adapter_of("bone", base)
    tensors |= {key: tensor + 1 for key, tensor in base.items() if ".ln1." in key}
    torch.save(tensors, folder / "a.pth")
    torch.save({prefix + key: tensor for key, tensor in tensors.items()}, folder / "wrapped.pth")
    expected, merged = run(folder, adapter="a.pth"), run(folder, adapter="wrapped.pth", output="other.pth")
    assert all(torch.equal(merged[key], expected[key]) for key in base)
    torch.save(tensors | {"model.head.weight": base["head.weight"]}, folder / "mixed.pth")
    with pytest.raises(UserError, match="1 of its .* tensors have no place in the base: there is no model.head.weight"):
        run(folder, adapter="mixed.pth")


@pytest.mark.parametrize("blocks, told", [((1,), True), ((0, 1), False)])
def test_an_adapter_on_chosen_blocks_merges_and_names_them(folder, blocks, told, capsys):
    base = open_base(folder / "base.pth").tensors
    tensors, _ = adapter_of("bone", base)
    torch.save({key: t for key, t in tensors.items() if int(key.split(".")[1]) in blocks}, folder / "a.pth")
    merged = run(folder, adapter="a.pth")
    changed = {key for key, tensor in base.items() if not torch.equal(tensor, merged[key])}
    assert changed == {f"blocks.{i}.{target}.weight" for i in blocks for target in TARGETS}
    assert ("\nblocks   it changes 1 of 0-1; the others stay" in capsys.readouterr().out) == told
    torch.save({"blocks.x.att.key.bone": torch.ones(RANK, 64)}, folder / "a.pth")
    with pytest.raises(UserError, match="1 of its 1 tensors have no place in the base: there is no blocks.x"):
        run(folder, adapter="a.pth")


def test_the_folder_of_a_run_of_rwkv_peft_names_its_files(folder):
    (folder / "run").mkdir()
    for name in ("rwkv-0.pth", "rwkv-1.pth", "train_log.txt"):
        (folder / "run" / name).touch()
    with pytest.raises(UserError, match=r"; give one of \S+/run/rwkv-0.pth, \S+/run/rwkv-1.pth$"):
        run(folder, adapter="run")


@pytest.mark.parametrize(
    "tensors, flags, message",
    [
        ({"lora_A": torch.ones(8, 64), "lora_B": torch.ones(64, 8)}, (), "does not record alpha: give --lora_alpha"),
        ({"lora_A": torch.ones(64), "lora_B": torch.ones(64, 8)}, ("--lora_alpha", 4), "lora_A have the shapes"),
        ({"lora_A": torch.ones(8, 64)}, (), "holds adapter tensors lora_A; one of .bone, .disha"),
        ({"init_lora_A": torch.ones(8, 64), "init_lora_B": torch.ones(64, 8)}, (), "give it as --lora_init"),
        ({"bone": torch.ones(8, 8)}, (), "neither all .rank, out. nor all blocks; they cannot be from one training"),
        ({"bone": torch.ones(8)}, (), "neither all"),
        ({"bone": torch.ones(8, 8, 8)}, (), "may be bat-in or bat-out: every layer in it is square"),
        ({"bone": torch.ones(8, 64)}, ("--lora_init", "{}/base.pth"), "--lora_init is for PiSSA"),
        ({"bone": torch.ones(8, 64)}, ("--type", "state"), "--type state contradicts .*a.pth, which holds a bone adap"),
    ],
)
def test_a_flat_file_that_is_ambiguous_or_damaged_is_refused(folder, tensors, flags, message):
    torch.save({f"blocks.0.att.key.{name}": tensor for name, tensor in tensors.items()}, folder / "a.pth")
    with pytest.raises(UserError, match=message):
        run(folder, *(str(flag).format(folder) for flag in flags), adapter="a.pth")
    assert not (folder / "merged.pth").exists()


def test_a_model_is_no_adapter(folder, tiny_state):
    for missing in ((), ("head.weight",), ("emb.weight", "head.weight")):
        torch.save({key: tensor for key, tensor in tiny_state().items() if key not in missing}, folder / "part.pth")
        with pytest.raises(UserError, match="part.pth is a model, not an adapter; give it as the base"):
            run(folder, adapter="part.pth")


@pytest.mark.parametrize("variant, scale", [("bone-mini", 1.0), ("olora", 0.5), ("lora-ga", 0.25), ("pissa", 2.0)])
def test_what_rwkv_peft_calls_otherwise_exports_to_the_same_merge(folder, variant, scale):
    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of(variant, base, scale=scale)
    paths = write_rwkv_peft(folder / "flat.pth", Adapter(tensors, metadata), base=base)
    back = read_adapter(paths[0], base=base, init=paths[1] if len(paths) > 1 else None)
    assert back.metadata.variant == ("bone" if variant == "bone-mini" else "pissa")
    merged, expected = (
        merged_tensors(base_of(base), [("a", adapter)]) for adapter in (back, Adapter(tensors, metadata))
    )
    assert all(torch.equal(merged[key], expected[key]) for key in base)


def test_export_overwrites_no_init_file_and_needs_the_widths_of_bone_mini(folder):
    base = open_base(folder / "base.pth").tensors
    (folder / "init_flat.pth").write_text("another's")
    with pytest.raises(UserError, match="init_flat.pth exists"):
        write_rwkv_peft(folder / "flat.pth", Adapter(*adapter_of("pissa", base)))
    assert (folder / "init_flat.pth").read_text() == "another's" and not (folder / "flat.pth").exists()
    with pytest.raises(UserError, match="give --base_model"):
        write_rwkv_peft(folder / "flat.pth", Adapter(*adapter_of("bone-mini", base)))


@pytest.mark.parametrize("variant", ["bone", "bat-in", "lora", "pissa"])
@pytest.mark.parametrize("parameter", ["disha", "bone"])
def test_export_to_rwkv_peft_and_back(folder, variant, parameter):
    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of(variant, base, scale=1.0)
    whole = {"blocks.0.ln1.weight": torch.randn(64)}
    write_rwkv_peft(folder / "flat.pth", Adapter(tensors | whole, metadata), parameter)
    init = folder / "init_flat.pth" if variant == "pissa" else None
    back = read_adapter(folder / "flat.pth", base=base, init=init, alpha=RANK if variant == "lora" else None)
    assert back.metadata.variant == variant and set(back.tensors) == set(tensors | whole)
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in (tensors | whole).items())


def test_export_refuses_what_rwkv_peft_does_not_have(folder):
    tensors, metadata = adapter_of("bat-out", open_base(folder / "base.pth").tensors)
    with pytest.raises(UserError, match="no bat-out"):
        write_rwkv_peft(folder / "flat.pth", Adapter(tensors, metadata))


def test_bone_of_two_ranks_or_of_no_layer_of_the_base_is_refused(folder):
    tensors, _ = adapter_of("bat-in", open_base(folder / "base.pth").tensors)
    key = next(iter(tensors))
    torch.save(tensors | {key: tensors[key].reshape(-1, RANK // 2, RANK // 2)}, folder / "a.pth")
    with pytest.raises(UserError, match=f"ranks {RANK // 2}, {RANK}; they cannot be from one training"):
        run(folder, adapter="a.pth")
    torch.save({key.replace("blocks", "layers"): tensor for key, tensor in tensors.items()}, folder / "a.pth")
    with pytest.raises(UserError, match="there is no layers.*it was trained on a model of other names"):
        run(folder, adapter="a.pth")


@pytest.mark.parametrize(
    "kind, init, variant",
    [
        ("BONE", True, "bone"),
        ("BONE", "bat", "bat-out"),
        ("BONE", True, "bat-out"),
        ("BONE", "bat-in", "bat-in"),
        ("BONE", "bat-out", "bat-out"),
        ("BONE", False, "bone"),
        ("MISS", True, "bone"),
        ("MISS", "bat", "bat-out"),
        ("MISS", "mini", "bone-mini"),
        *(("LORA", init, "lora") for init in (True, "gaussian", "orthogonal", "eva", "mica")),
    ],
)
@pytest.mark.parametrize("official", [True, False])
def test_folders_of_hugging_face_peft_merge(folder, kind, init, variant, official):
    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of(variant, base)
    told = "init_lora_weights" if kind == "LORA" else "init_weights"
    write_hf_folder(folder, tensors, {"peft_type": kind, told: init}, official)
    merged = run(folder, adapter="hf")
    expected = merged_tensors(base_of(base), [("a", Adapter(tensors, metadata))])
    assert all(torch.equal(merged[key], expected[key]) for key in base)


def write_hf_folder(folder, tensors, config, official=True):
    """Write a folder hf as peft saves it; config is added to the settings that all of them have here."""
    kind, peft = config["peft_type"], {}
    for key, tensor in tensors.items():
        key = (
            key.replace(".bone", f".{kind.lower()}_block")
            .replace("lora_A", "lora_A.weight")
            .replace("lora_B", "lora_B.weight")
        )
        if not official:
            key = "rwkv." + key.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
        peft[f"base_model.model.{key}"] = tensor
    (folder / "hf").mkdir()
    save_file(peft, folder / "hf" / "adapter_model.safetensors")
    config = {"r": RANK, "mini_r": 4, "lora_alpha": 4, "init_lora_weights": True} | config
    given = {key: value for key, value in config.items() if value != "none"}
    (folder / "hf" / "adapter_config.json").write_text(json.dumps(given))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"peft_type": "IA3", "r": 4}, "IA3 adapter"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_dora": True}, "use_dora"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "init_lora_weights": "loftq"}, "loftq.*changes the base"),
        (None, r"^\S+ has no adapter_config.json"),
    ],
)
def test_folders_that_cannot_be_merged_are_refused(folder, config, message):
    (folder / "hf").mkdir()
    save_file(
        {"base_model.model.blocks.0.att.key.bone_block": torch.ones(4, 64)}, folder / "hf" / "adapter_model.safetensors"
    )
    if config:
        (folder / "hf" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        run(folder, adapter="hf")


@pytest.mark.parametrize(
    "variant, config, message",
    [
        (
            "bone",
            {"init_weights": "bat-in"},
            "init_weights is 'bat-in' in adapter_config.json, and its tensors have .2. dimensions",
        ),
        ("bat-in", {"init_weights": "mini"}, "init_weights is 'mini' .* have .3. dim"),
        ("bone", {"init_weights": "ortho"}, "init_weights is 'ortho'"),
        ("bone", {"r": "none"}, "r = None"),
        ("lora", {"peft_type": "LORA", "r": True}, "r = True"),
        ("lora", {"peft_type": "LORA", "lora_alpha": "none"}, "lora_alpha = None"),
        ("lora", {"peft_type": "LORA", "lora_alpha": float("inf")}, "lora_alpha = inf"),
        ("lora", {"peft_type": "LORA", "r": 64}, "lora_A has shape .* and r is 64"),
        ("lora", {"peft_type": "LORA", "lora_bias": True}, "lora_bias"),
        ("lora", {"peft_type": "LORA", "alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ("lora", {"peft_type": "LORA", "kasa_config": {"kasa_beta": 1e-4}}, "kasa_config"),
    ],
)
def test_settings_of_peft_that_contradict_the_tensors_are_refused(folder, variant, config, message):
    tensors, _ = adapter_of(variant, open_base(folder / "base.pth").tensors)
    write_hf_folder(folder, tensors, {"peft_type": "BONE", "init_weights": True} | config)
    with pytest.raises(UserError, match=message):
        run(folder, adapter="hf")


@pytest.mark.parametrize("init", [True, "bat", "bat-in", "mini"])
def test_bone_trained_through_our_own_config_merges_as_it_unloads(folder, init):
    peft = pytest.importorskip("peft")
    from rwkv_peft.hf import BoneConfig

    mini = {"mini_r": 4} if init == "mini" else {}
    base = open_base(folder / "base.pth").tensors
    model = RWKV6(base_of(base).config)
    model.load_state_dict({key: tensor.float() for key, tensor in base.items()})
    targets = ["att.key", "att.value", "ffn.key"]
    wrapped = peft.get_peft_model(model, BoneConfig(r=RANK, init_weights=init, target_modules=targets, **mini))
    for name, parameter in wrapped.named_parameters():
        if "_block" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(folder / "hf")
    merged = run(folder, "--output_dtype", "fp32", adapter="hf")
    expected = wrapped.merge_and_unload().state_dict()
    assert set(expected) == set(merged)
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)
    assert (merged["blocks.0.att.key.weight"] - base["blocks.0.att.key.weight"]).abs().max() > 0.01


def test_a_folder_of_another_architecture_is_refused(folder, shared_data):
    with pytest.raises(UserError, match="no place in the base"):
        run(folder, adapter=shared_data / "peft_bone_adapters" / "bone_r4")


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


LIGHTNING = {"format_version": 1, "method": "miss", "kind": "inference_adapter", "layout": "modulo_rank_zero_pad"}


@pytest.mark.parametrize("scale", [1, 0.5])
def test_a_folder_of_rwkv_lightning_cuda_is_a_bone_adapter(base, merged, tmp_path, scale):
    adapter = drawn(base, MISS)
    (tmp_path / "served").mkdir()
    tensors = {f"{module}.weight.D": (params["D"].T / scale).contiguous() for module, params in adapter.items()}
    torch.save(tensors, tmp_path / "served" / "adapter.pth")
    (tmp_path / "served" / "adapter.json").write_text(json.dumps(LIGHTNING | {"rank": RANK, "scale": scale}))
    check(base, merged("served"), MISS, adapter)


def save_with_manifest(path, tensors, manifest):
    """Write a .pth with a manifest in its archive, as rwkv_lightning_cuda's pth_writer does."""
    save_pth(path, tensors)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/miss.json", manifest)


@pytest.mark.parametrize("master", [False, True])
def test_a_file_of_rwkv_lightning_cuda_is_a_bone_adapter(base, merged, tmp_path, master):
    """adapter-final.pth, in bfloat16 with its manifest inside, and a checkpoint's training.pth, whose masters count."""
    kind = torch.float32 if master else torch.bfloat16
    adapter = {
        module: {name: tensor.to(kind).float() for name, tensor in params.items()}
        for module, params in drawn(base, MISS).items()
    }
    tensors = {f"{module}.weight.D": params["D"].T.to(kind).contiguous() for module, params in adapter.items()}
    if master:
        moments = {f"{key}.{name}": torch.ones_like(tensor) for key, tensor in tensors.items() for name in "gmv"}
        tensors = {f"{key}.master": tensor for key, tensor in tensors.items()} | moments
    manifest = LIGHTNING | {"rank": RANK, "scale": 1, "tensor_source": "master" if master else "D"}
    save_with_manifest(tmp_path / "adapter-final.pth", tensors, json.dumps(manifest))
    check(base, merged("adapter-final.pth"), MISS, adapter)
    convert(tmp_path / "adapter-final.pth", tmp_path / "ours.safetensors")
    ours = read_adapter(tmp_path / "ours.safetensors")
    assert all(torch.equal(ours.tensors[f"{module}.bone"].float(), params["D"]) for module, params in adapter.items())


@pytest.mark.parametrize(
    "manifest, message",
    [("{", "has a damaged miss.json"), ("[]", "its miss.json holds no settings"), ("{}", "format_version is None")],
)
def test_a_file_of_rwkv_lightning_cuda_with_another_manifest_is_refused(merged, tmp_path, manifest, message):
    save_with_manifest(tmp_path / "a.pth", {"blocks.0.att.key.weight.D": torch.ones(32, RANK)}, manifest)
    with pytest.raises(UserError, match=message):
        merged("a.pth")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "lora"}, "method is 'lora', and 'miss' is read here"),
        ({"format_version": 2}, "format_version is 2"),
        ({"scale": 0}, "scale = 0, and two finite numbers other than 0 are due"),
        ({"scale": 10**400}, "two finite numbers other than 0 are due"),
        ({"rank": 4}, "not all tensors of adapter.pth are D of rank 4"),
    ],
)
def test_a_folder_of_rwkv_lightning_cuda_that_is_damaged_is_refused(merged, tmp_path, change, message):
    (tmp_path / "served").mkdir()
    torch.save({"blocks.0.att.key.weight.D": torch.ones(32, RANK)}, tmp_path / "served" / "adapter.pth")
    (tmp_path / "served" / "adapter.json").write_text(json.dumps(LIGHTNING | {"rank": RANK, "scale": 1} | change))
    with pytest.raises(UserError, match=message):
        merged("served")
