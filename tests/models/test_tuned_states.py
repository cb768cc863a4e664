"""Tuned time states in the model of every generation: sequences begin from them, and their gradients are right, against
float64 and a state that is passed by hand."""

import pytest
import torch

import families
from families import DISTINCT
from rwkv_peft.models.state import State, is_time_state, state_of, time_state_key

pytestmark = pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)


def shaken(family, head_size=8):
    """A float64 model without zeros in its tensors, with random time states; and the states as in a file."""
    model = families.shaken(family, n_embd=24, head_size=head_size).double()
    H = model.config.n_head
    tensors = {time_state_key(i): torch.randn(H, head_size, head_size, dtype=torch.float64) for i in range(2)}
    model.tune_states(in_model(family, model, tensors))
    return model, tensors


def in_model(family, model, tensors):
    """The State of one sequence of {key: time state}, in float64."""
    zeros = State.zeros(model.config, 1, dtype=torch.float64)
    zeros = State(layer._replace(wkv=layer.wkv.double()) for layer in zeros)
    return state_of(tensors, zeros, family.rows_are_keys, "the test")


def loss_of(model, tokens, state=None, cu_seqlens=None):
    """A number that depends on every logit with a different weight."""
    logits = model(tokens, state, cu_seqlens)[0].double()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (logits * weights).mean()


def gradients(model, loss):
    """{key: gradient} of the time states."""
    states = {key: parameter for key, parameter in model.named_parameters() if is_time_state(key)}
    return dict(zip(states, torch.autograd.grad(loss, list(states.values()))))


@pytest.mark.parametrize("packed", [False, True])
def test_every_sequence_begins_at_the_states(family, packed):
    model, tensors = shaken(family)
    tokens = torch.randint(30, (1, 13) if packed else (3, 7))
    cu_seqlens = torch.tensor([0, 4, 5, 13], dtype=torch.int32) if packed else None
    given = {key: tensor.clone().requires_grad_() for key, tensor in tensors.items()}
    start = State(
        layer._replace(wkv=(given[key].mT if family.rows_are_keys else given[key])[None])
        for layer, key in zip(in_model(family, model, tensors), given)
    ).repeated(3)
    expected_loss = loss_of(model, tokens, start, cu_seqlens)
    expected = torch.autograd.grad(expected_loss, list(given.values()))
    loss = loss_of(model, tokens, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    found = gradients(model, loss)
    for key, tensor in zip(given, expected):
        torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-12)


def test_sequences_beyond_the_states_that_are_given_begin_anew(family):
    model, _ = shaken(family)
    tokens = torch.randint(30, (1, 20))
    whole, last = model(tokens, cu_seqlens=torch.tensor([0, 9, 14, 20], dtype=torch.int32))
    _, carried = model(tokens[:, :6])
    rest, state = model(tokens[:, 6:], carried, torch.tensor([0, 3, 8, 14], dtype=torch.int32))
    torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state[1].wkv, last[1].wkv, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("head_size, T", [(8, 1), (8, 37), (4, 70)])
def test_kernels_give_the_states_the_gradient_of_float64(family, dtype, limit, head_size, T):
    model, _ = shaken(family, head_size)
    tokens = torch.randint(30, (2, T))
    expected = gradients(model, loss_of(model, tokens))
    found = gradients(model.to(dtype), loss_of(model, tokens))
    for key, tensor in expected.items():
        assert (found[key].double() - tensor).norm() <= limit * tensor.norm(), key
