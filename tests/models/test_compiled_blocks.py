"""Compiled blocks are one graph, which runs the kernels that plain blocks run and computes the same."""

import pytest
import torch

from families import DISTINCT
from rwkv_peft.adapters.inject import inject
from rwkv_peft.config import AdapterConfig
from rwkv_peft.models.layout import LayerState
from rwkv_peft.models.state import State
from rwkv_peft.ops.bone import cpu as bone
from rwkv_peft.ops.mix import functions as mix

ADAPTERS = {
    "bat-in": AdapterConfig(rank=8),
    "bone": AdapterConfig(mode="bone", rank=8),
    "lora": AdapterConfig(method="lora", rank=4, alpha=8.0),
}
KINDS = [(DISTINCT[0], "bat-in"), (DISTINCT[-1], "bat-in"), (DISTINCT[0], "bone"), (DISTINCT[-1], "lora")]


def model_of(family, adapter):
    torch.manual_seed(0)
    model = family.build(family.new_dimensions(1, 64, 40))
    inject(model, ADAPTERS[adapter], family=family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    return model


def step(model, state):
    """Logits of packed rows, and the gradient of every parameter that trains."""
    tokens, bounds = torch.arange(29)[None], torch.tensor([0, 3, 4, 17, 29])
    y, _ = model(tokens, state, bounds)
    model.zero_grad()
    y.square().sum().backward()
    return [y, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def ran(monkeypatch):
    """The names of the kernels of mix and bone that run, in their order."""
    names = []
    for operator in (mix.compute, bone.compute):
        run = operator.run
        monkeypatch.setattr(
            operator, "run", lambda name, *rest, run=run, **how: (names.append(name), run(name, *rest, **how))
        )
    return names


@pytest.mark.parametrize(
    "backend, part, from_state", [("inductor", "ffn", False), ("aot_eager_decomp_partition", "", True)]
)
@pytest.mark.parametrize("family, adapter", KINDS, ids=lambda of: getattr(of, "name", of))
def test_packed_rows_are_the_same_in_one_graph(family, adapter, backend, part, from_state, ran):
    """A compiler needs a second for each kernel that torch writes for "inductor", so that the whole block is left to a
    backend without any."""
    model = model_of(family, adapter)
    started = State(LayerState(*map(torch.randn_like, layer)) for layer in State.zeros(model.config, 4))
    state = started if from_state else None
    expected, plain = step(model, state), sorted(ran)
    assert {"lerp_forward", "lerp_backward", "relu_square_forward"} <= set(plain)
    ran.clear()
    torch.compiler.reset()
    with torch._dynamo.config.patch(specialize_float=True):
        for block in model.blocks:
            block.get_submodule(part).compile(backend=backend, fullgraph=True, dynamic=True)
        for x, y in zip(step(model, state), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * y.abs().max().item())
    assert sorted(ran) == plain
