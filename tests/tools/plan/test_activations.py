"""The plan's formulas predict what training steps keep and need, and count what is there, for every generation and
method."""

import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from families import DISTINCT
from rwkv_peft.adapters import quant
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.methods import METHODS, words_of
from rwkv_peft.checkpoints.pth_header import read_header
from rwkv_peft.cli.names import NONE
from rwkv_peft.config import AdapterConfig, TrainConfig
from rwkv_peft.inference import forward
from rwkv_peft.models import FAMILIES
from rwkv_peft.objectives import cross_entropy, divergence
from rwkv_peft.ops import products as dense
from rwkv_peft.ops.cross_entropy import CUDA
from rwkv_peft.training.estimate import activations, memory
from rwkv_peft.training.estimate.activations import CPU, GPU, ITEM
from rwkv_peft.training.estimate.memory import activations_of, count
from rwkv_peft.training.saving import checkpoints, products
from rwkv_peft.training.step import shared_prefix
from tools.plan import rehearsal
from tools.plan.rehearsal import NEW, Tracker, drawing_bytes, estimate, logit_bytes, step_bytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {family.version: family for family in FAMILIES}


def adapter_of(name, family, parts=(), **settings):
    words = {"method": NONE} if name == NONE else words_of(METHODS[name])
    sizes = {"rank": 16, "mini_rank": 16} | settings
    return AdapterConfig(**words, **sizes, targets=family.targets, train_parts=parts)


def test_every_generation_and_method_has_its_formula():
    assert set(activations.BLOCKS) == set(NAMES) and set(activations.METHODS) == set(METHODS)


# generation, method, precision, device, --grad_cp, --train_parts
CASES = [
    *(("x060", name, "bf16", GPU, False, ()) for name in (*METHODS, NONE)),
    *(("x070", name, "bf16", GPU, False, ()) for name in ("bone", "bat-in", "dora")),
    *((version, name, "bf16", GPU, False, ()) for version in ("x070a", "x070b") for name in ("bone", "dora")),
    *((version, NONE, "bf16", GPU, True, ()) for version in NAMES),
    *((version, "bat-in", "bf16", GPU, True, ("time",)) for version in NAMES),
    *((version, NONE, "fp32", CPU, False, ("emb", "head")) for version in NAMES),
    *((version, "bat-in", "bf16", GPU, False, ("ln",)) for version in NAMES),
    *((version, "bat-in", "bf16", CPU, True, ()) for version in ("x060", "x070")),
]


@pytest.mark.parametrize("version, name, precision, device, grad_cp, parts", CASES)
@pytest.mark.processor
def test_a_step_keeps_and_needs_what_the_formulas_say(monkeypatch, version, name, precision, device, grad_cp, parts):
    """Within 2 % of what is kept, and of the peak, on a processor that converts no factors of products."""
    monkeypatch.setattr(dense, "converts", lambda x: False)
    family, rows, tokens = NAMES[version], 2, 512
    config, adapter = family.new_dimensions(2, 256, 80), adapter_of(name, family, parts)
    place = torch.device("meta" if device == GPU else "cpu")
    kept, states, work = step_bytes(family, config, adapter, DTYPES[precision], place, grad_cp, rows, tokens)
    found = activations_of(config, adapter, TrainConfig(precision=precision, grad_cp=grad_cp), device)
    assert found.kept(rows, tokens) == pytest.approx(kept, rel=0.02)
    assert found.kept(rows, tokens) + found.work(rows, tokens) == pytest.approx(kept + work, rel=0.02)
    if "length" not in config.layer_state._fields:
        assert found.states(rows) == pytest.approx(states, rel=0.01)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_what_torch_does_without_kernels_is_bounded(family, precision):
    config, adapter, dtype = family.new_dimensions(2, 256, 80), adapter_of("bat-in", family), DTYPES[precision]
    for grad_cp in (False, True):
        kept, _, work = step_bytes(family, config, adapter, dtype, torch.device("meta"), grad_cp, 2, 512)
        found = activations_of(config, adapter, TrainConfig(precision=precision, grad_cp=grad_cp), GPU)
        assert kept + work < found.kept(2, 512) + found.work(2, 512) < 2 * (kept + work)


def test_a_generation_without_a_formula_is_bounded(monkeypatch):
    for family in FAMILIES:
        config, adapter = family.new_dimensions(4, 256, 80), adapter_of("bat-in", family)
        known = activations_of(config, adapter, TrainConfig(), GPU)
        with monkeypatch.context() as patch:
            patch.setattr(activations, "BLOCKS", {})
            bound = activations_of.__wrapped__(config, adapter, TrainConfig(), GPU)
        assert known.kept(1, 512) < bound.kept(1, 512) < 3 * known.kept(1, 512)


def saved_bytes(model, batch):
    """Bytes of the tensors that autograd keeps in a real step on a real model, without parameters."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch, head=lambda x, weight: (x @ weight.t()).sum())[0]
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), batch)}
    loss.backward()
    return sum(size for pointer, size in storages.items() if pointer not in own)


REAL = [(DISTINCT[0], name) for name in (*METHODS, NONE)] + [(DISTINCT[1], name) for name in ("bat-in", "bone", NONE)]


@pytest.mark.parametrize("family, name", REAL, ids=[f"{family.name}, {name}" for family, name in REAL])
@pytest.mark.processor
def test_what_is_kept_is_what_autograd_keeps_of_a_real_model(family, name):
    config = family.new_dimensions(5, 64, 80, head_size=32)
    adapter = adapter_of(name, family)
    model = family.build(config)
    family.init_weights(model)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    gradients = {name: torch.randn_like(module.weight) for name, module in layers}
    inject(model, adapter, family=family, gradients=gradients)
    torch.manual_seed(0)
    saved = saved_bytes(model.train(), torch.randint(80, (3, 192)))
    found = activations_of(config, adapter, TrainConfig(precision="fp32"), CPU)
    assert found.kept(3, 192) == pytest.approx(saved, rel=0.03)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_parameters_are_counted_exactly(family):
    config = family.new_dimensions(3, 64, 80, head_size=32)
    plain = [adapter_of(name, family) for name in (*METHODS, NONE)]
    parts = [adapter_of(name, family, ("state", *family.parts)) for name in ("bat-in", NONE)]
    parts += [adapter_of(NONE, family, ("state",), state_parts=names) for names in (("shift",), ("wkv", "shift"))]
    for adapter in (*plain, *parts, adapter_of("bone", family, quant="nf4"), adapter_of("lora", family, rank=1)):
        assert count(config, adapter) == rehearsal.count(family, config, adapter)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_sizes_fit(name):
    config = adapter_of(name, FAMILIES[0])
    for value, out, in_ in product((1, 3, 16, 24, 64, 96, 200), (64, 96), (64, 96)):
        sized = replace(config, rank=value, mini_rank=value)
        assert activations.METHODS[name].fits(sized, out, in_) == (
            METHODS[name].tensors.misfit(sized, out, in_) is None
        )


def test_numbers_are_those_of_the_modules_that_import_torch():
    assert (memory.OPTIMIZER, memory.MATRIX, memory.KEPT) == (products.OPTIMIZER, products.MATRIX, checkpoints.KEPT)
    assert memory.CHUNK_ELEMENTS == {CPU: cross_entropy.CHUNK_ELEMENTS, GPU: cross_entropy.GPU_CHUNK_ELEMENTS}
    assert memory.ROW_ELEMENTS == {CPU: quant.ROW_ELEMENTS, GPU: quant.GPU_ROW_ELEMENTS}
    assert {kind: quant.block_size(kind) for kind in ("nf4", "int8")} == memory.BLOCK_SIZES
    assert (memory.ALIVE, memory.PREFILL, memory.ROOM) == (divergence.ALIVE, forward.PREFILL, shared_prefix.ROOM)
    for strategy, ranks, pieces in product(("1", "2", "2_offload", "3"), (1, 2), (1, 2)):
        flags = ("--strategy", f"deepspeed_stage_{strategy}", "--devices", ranks, "--accumulate_grad_batches", pieces)
        planned = estimate(*map(str, flags))
        names = {part.name for part in planned.parts()}
        assert ("gradients, in buckets" in names) == planned.config.train.uses_zero


def test_logits_take_the_bytes_that_are_counted(monkeypatch):
    for (precision, dtype), device in product(DTYPES.items(), ("cpu", "meta")):
        kernels = activations.has_kernels(precision, {"cpu": CPU, "meta": GPU}[device])
        plain = ITEM[precision] if kernels else 8
        assert logit_bytes(1000, dtype, device, False) == pytest.approx(plain * 1000, rel=0.05)
        assert logit_bytes(1000, dtype, device, True) == pytest.approx(memory.TAUGHT[ITEM[precision]] * 1000, rel=0.05)
    assert drawing_bytes(65536, 1.0, "cpu") == pytest.approx(memory.DRAWN * 65536, rel=0.01)
    for (accelerator, each), (device, graph) in zip(memory.NUCLEUS.items(), (("cpu", 0), ("meta", 4))):
        assert drawing_bytes(65536, 0.9, device) + graph * 65536 == pytest.approx(each * 65536, rel=0.01), accelerator
    monkeypatch.setattr(CUDA, "takes", lambda logits: False)
    assert logit_bytes(1001, torch.bfloat16, "meta", False) == pytest.approx(8 * 1001, rel=0.05)


def test_a_tracker_counts_what_is_alive():
    with Tracker() as tracker:
        x = torch.zeros(1000)
        y = x.view(10, 100) + 1  # a view holds nothing of its own
        assert (tracker.live, tracker.peak) == (8000, 8000)
        del y
        x = weakref.ref(x)() * 2
        assert (tracker.live, tracker.peak) == (4000, 8000)


def test_a_header_is_what_torch_reads(tmp_path, tiny_state):
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        torch.save(tiny_state(dtype=dtype), tmp_path / "base.pth")
        tensors = torch.load(tmp_path / "base.pth")
        expected = {key: (tuple(tensor.shape), name, tensor.nbytes) for key, tensor in tensors.items()}
        assert read_header(tmp_path / "base.pth") == expected
    whole = (tmp_path / "base.pth").read_bytes()
    torch.save({"x": SimpleNamespace()}, tmp_path / "object.pth")
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    assert [read_header(tmp_path / name) for name in ("object.pth", "cut.pth", "none.pth")] == [None] * 3


@pytest.mark.parametrize(
    "more",
    ["", "--load_model base.pth --bone_r 16", "--load_model base.pth --train_type state --state_parts wkv shift"],
)
def test_a_plan_imports_no_torch(tmp_path, tiny_state, more):
    torch.save(tiny_state(dtype=torch.bfloat16), tmp_path / "base.pth")
    argv = [*(more.split() or NEW), "--gpu", "8GiB"]
    code = (
        f"import sys\nfrom rwkv_peft.cli.commands import main\nmain({['plan', *argv]})\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, "plan", *argv], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("\nFalse\n"), done.stderr
