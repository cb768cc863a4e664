"""--compile compiles every block for any batches: torch never recompiles one so often that it gives up."""

import sysconfig

import pytest
import torch
from torch import nn
from torch._dynamo import utils

from families import DISTINCT
from rwkv_peft.adapters.inject import inject
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import AdapterConfig, DataConfig
from rwkv_peft.data.samples import collate
from rwkv_peft.objectives.dpo import DPO
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.step.compiling import compiled, uncompiled
from rwkv_peft.training.step.steps import Whole
from training.runs import ROOT


@pytest.fixture
def all_or_error(monkeypatch):
    """torch.compile without its slow backend; it raises if it would leave a block uncompiled."""
    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda block, **how: whole(block, backend="eager", **how))
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "family, adapter",
    [(DISTINCT[0], AdapterConfig(rank=8)), (DISTINCT[-1], AdapterConfig(method="lora", rank=4, alpha=2.0))],
    ids=["RWKV-6 bat-in", "RWKV-7 lora"],
)
def test_each_kind_of_block_is_compiled_once(family, adapter, all_or_error):
    """Over batches with different lengths and numbers of documents, and some without gradients between them."""
    utils.counters.clear()
    model = family.build(family.new_dimensions(3, 64, 40)).requires_grad_(False)
    family.init_weights(model)
    inject(model, adapter, family=family)
    with compiled(model, DataConfig(path="", dataload="pack")):
        for lengths in ((3, 4, 5), (9, 2), (2, 7, 1, 6)):
            tokens, bounds = torch.arange(sum(lengths))[None], torch.tensor([0, *lengths]).cumsum(0)
            model(tokens, cu_seqlens=bounds)[0].sum().backward()
            with uncompiled(True), torch.no_grad():
                model.eval()(tokens[:, :2])
            model.train()
    assert utils.counters["frames"]["total"] == 2  # the first, and all others


@pytest.mark.parametrize("lacks", ["a compiler", "headers"])
def test_a_machine_that_cannot_compile_ends_with_the_remedy(monkeypatch, tmp_path, lacks):
    if lacks == "a compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        words = r"--compile needs a C\+\+ compiler, and g\+\+, .*apt install g\+\+"
    else:
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        words = f"--compile needs Python's headers, and {tmp_path}/Python.h does not exist; .*apt install python3-dev"
    base = str(ROOT / "demo" / "rwkv6-demo.pth")
    with pytest.raises(UserError, match=words):
        parse_run(["--load_model", base, "--data_file", "data", "--bone_r", "16", "--lr_init", "1e-3", "--compile"])


def test_pairs_train_and_validate_compiled(all_or_error):
    """The first block, the last and one between, with a gradient and without, as they train and as they validate, with
    adapters and as the base, though a prompt is computed once."""
    torch.manual_seed(0)
    family = DISTINCT[-1]
    model = family.build(family.new_dimensions(3, 64, 40))
    family.init_weights(model)
    inject(model, AdapterConfig(method="lora", rank=4, dropout=0.5), family=family)
    step = Whole(DPO(0.1), group=2)
    with compiled(model, DataConfig(path="", data_type="pairs")):
        for sizes in ((9, 12), (3, 5)):
            batch = collate([[(torch.arange(size), torch.arange(size - 1) > 0) for size in sizes]])
            batch = step.prepare_inputs(batch, torch.device("cpu"))
            step.loss(model, batch, 1).backward()
            model.eval()
            step.total(model, batch)
            model.train()
