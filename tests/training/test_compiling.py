"""--compile: every form in which a run calls a block is compiled, also those that torch's own limit would leave out."""

import pytest
import torch
from torch import nn

from rwkv_peft.adapters.inject import inject
from rwkv_peft.config import AdapterConfig
from rwkv_peft.data.batches import collate
from rwkv_peft.models import FAMILIES
from rwkv_peft.training.compiling import compile_blocks
from rwkv_peft.training.preferences import Preferences


@pytest.fixture
def all_or_error(monkeypatch):
    """torch.compile without the minutes of its backend; it raises where it would leave a block as it is."""
    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: whole(module, backend="eager"))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True, cache_size_limit=8):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_pairs_train_and_validate_compiled(family, all_or_error):
    """The first block, the last and one between, with a gradient and without, as they train and as they validate, with
    adapters and as the base."""
    torch.manual_seed(0)
    model = family.build(family.new_dimensions(3, 64, 40))
    family.init_weights(model)
    inject(model, AdapterConfig(method="lora", rank=4, dropout=0.5), family=family)
    compile_blocks(model)
    step = Preferences(beta=0.1)
    batch = collate([[(torch.arange(size), torch.ones(size - 1, dtype=torch.bool)) for size in (9, 12)]])
    step.loss(model, batch, 1).backward()
    model.eval()
    step.total(model, batch)
