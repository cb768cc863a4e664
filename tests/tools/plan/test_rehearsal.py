"""A rehearsal of three blocks predicts the bytes that a whole model keeps for its backward pass, for every method."""

import weakref

import pytest
import torch

from families import DISTINCT
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.methods import METHODS, words_of
from rwkv_peft.cli.names import NONE
from rwkv_peft.config import AdapterConfig
from rwkv_peft.ops.cross_entropy import cuda as cross_entropy
from rwkv_peft.tools.plan.rehearsal import Tracker, build, count, logit_bytes, rehearse, step_bytes

ROWS, TOKENS = 3, 192
CPU, GPU = torch.device("cpu"), torch.device("meta")


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


def adapter_of(name, family):
    words = {"method": NONE} if name == NONE else words_of(METHODS[name])
    return AdapterConfig(**words, rank=16, mini_rank=16, entries=16, targets=family.targets)


CASES = [(DISTINCT[0], name) for name in (*METHODS, NONE)] + [(DISTINCT[1], name) for name in ("bat-in", "bone", NONE)]


@pytest.mark.parametrize("family, name", CASES, ids=[f"{family.name}, {name}" for family, name in CASES])
def test_what_is_kept_is_what_autograd_keeps_of_the_whole_model(family, name):
    config = family.new_dimensions(5, 64, 80, head_size=32)
    adapter = adapter_of(name, family)
    model = family.build(config)
    family.init_weights(model)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    gradients = {name: torch.randn_like(module.weight) for name, module in layers}
    report = inject(model, adapter, family=family, gradients=gradients)
    torch.manual_seed(0)
    saved = saved_bytes(model.train(), torch.randint(80, (ROWS, TOKENS)))
    told = rehearse(family, config, adapter, torch.float32, CPU, False).kept.at(ROWS, TOKENS)
    assert told == pytest.approx(saved, rel=0.02)
    counts = count(family, config, adapter)
    assert (counts.trains, counts.total) == (report.trainable, report.total)


@pytest.mark.parametrize("device", [CPU, GPU], ids=("cpu", "gpu"))
@pytest.mark.parametrize("grad_cp", [False, True])
def test_any_depth_and_batch_follow_from_three_blocks(device, grad_cp):
    for family in DISTINCT:
        adapter, config = adapter_of("bat-in", family), family.new_dimensions(5, 64, 80)
        kept, states, work, _ = step_bytes(family, config, adapter, torch.bfloat16, device, grad_cp, 3, 256)
        told = rehearse(family, config, adapter, torch.bfloat16, device, grad_cp)
        assert told.kept.at(3, 256) == pytest.approx(kept, rel=0.01)
        assert told.kept.at(3, 256) + told.states.at(3, 256) == pytest.approx(kept + states, rel=0.01)
        assert told.kept.at(3, 256) + told.work.at(3, 256) == pytest.approx(kept + work, rel=0.03)


@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_what_a_large_model_needs_at_once_on_a_gpu(family):
    """With few tokens the needs of its wide layers would dominate."""
    adapter, config = adapter_of("bat-in", family), family.new_dimensions(3, 2048, 80)
    _, _, work, _ = step_bytes(family, config, adapter, torch.bfloat16, GPU, True, 14, 1024)
    told = rehearse(family, config, adapter, torch.bfloat16, GPU, True).work
    assert told.at(14, 1024) == pytest.approx(work, rel=0.01)


def test_recomputing_blocks_keeps_their_inputs_alone():
    family = DISTINCT[0]
    adapter, config = adapter_of("bone", family), family.new_dimensions(6, 64, 80, head_size=32)
    kept = rehearse(family, config, adapter, torch.float32, CPU, True).kept.at(1, 512)
    assert kept == pytest.approx(6 * 512 * 64 * 4, rel=0.3)
    assert kept < rehearse(family, config, adapter, torch.float32, CPU, False).kept.at(1, 512) / 8


def test_a_tracker_counts_what_is_alive():
    with Tracker() as tracker:
        x = torch.zeros(1000)
        y = x.view(10, 100) + 1  # a view holds nothing of its own
        assert (tracker.live, tracker.peak) == (8000, 8000)
        del y
        x = weakref.ref(x)() * 2
        assert (tracker.live, tracker.peak) == (4000, 8000)


def test_logits_take_their_own_place_and_without_a_kernel_float32_copies(monkeypatch):
    for device in ("cpu", "meta"):
        assert logit_bytes(1000, torch.bfloat16, device) == pytest.approx(2 * 1000, rel=0.05)
    monkeypatch.setattr(cross_entropy, "takes", lambda logits: False)
    assert logit_bytes(1001, torch.bfloat16, "meta") == pytest.approx(8 * 1001, rel=0.05)


def test_a_model_of_14b_is_counted_without_its_memory():
    family = DISTINCT[0]
    config = family.new_dimensions(61, 4096, 65536)
    counts = count(family, config, AdapterConfig(targets=family.targets, quant="nf4"))
    assert counts.total - counts.own == sum(torch.Size(shape).numel() for shape in family.shapes(config).values())
    assert all(p.is_meta for p in build(family, config, AdapterConfig(targets=family.targets), False).parameters())
