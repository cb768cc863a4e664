"""Compiled blocks compute the same as plain ones."""

import pytest
import torch

from families import DISTINCT
from rwkv_peft.adapters.inject import inject
from rwkv_peft.config import AdapterConfig
from rwkv_peft.models.state import LayerState, State


def model_of(family):
    torch.manual_seed(0)
    model = family.build(family.new_dimensions(1, 64, 40))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    inject(model, AdapterConfig(method="bone", mode="bat-in", rank=8), family=family)
    return model


def step(model, state):
    """Logits of packed rows, and the gradient of every parameter that trains."""
    tokens, bounds = torch.arange(29)[None], torch.tensor([0, 3, 4, 17, 29])
    y, _ = model(tokens, state, bounds)
    model.zero_grad()
    y.square().sum().backward()
    return [y, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "backend, part, states", [("inductor", "ffn", (False,)), ("aot_eager_decomp_partition", "", (False, True))]
)
def test_packed_rows_are_the_same_from_nothing_and_from_states(backend, part, states):
    """Take blocks of the newest generation. A compiler needs a second for each kernel that torch writes for "inductor",
    so that the whole block is left to a backend without any."""
    model = model_of(DISTINCT[-1])
    started = State(LayerState(*map(torch.randn_like, layer)) for layer in State.zeros(model.config, 4))
    begins = [started if from_state else None for from_state in states]
    expected = [step(model, state) for state in begins]
    torch.compiler.reset()
    for block in model.blocks:
        block.get_submodule(part).compile(backend=backend)
    for state, true in zip(begins, expected):
        for x, y in zip(step(model, state), true, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * y.abs().max().item())
