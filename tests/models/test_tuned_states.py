"""Tuned time states in the model of every generation: sequences begin from them, and their gradients are right, against
each generation written out in float64, whatever parts of the states are tuned."""

import pytest
import torch

import families
from models.plain import PLAIN
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models import FAMILIES
from rwkv_peft.models.layout import is_time_state, time_state_shapes
from rwkv_peft.models.state import State, state_of

pytestmark = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
PARTS = pytest.mark.parametrize("parts", [("wkv",), ("shift",), ("wkv", "shift")], ids="+".join)
BOUNDS = (0, 4, 5, 13)


def shaken(family, head_size=8, parts=("wkv", "shift")):
    """A float64 model without zeros in its tensors, with random time states; and the states as in a file."""
    sizes = {"n_embd": 24, "head_size": head_size}
    model = families.shaken(family, **sizes).double()
    shapes = time_state_shapes(model.config, parts)
    tensors = {key: torch.randn(shape, dtype=torch.float64) for key, shape in shapes.items()}
    model.tune_states(in_model(family, model, tensors), parts)
    return model, tensors


def in_model(family, model, tensors):
    """The State of one sequence of {key: time state}, in float64."""
    zeros = State.zeros(model.config, 1, dtype=torch.float64)
    zeros = State(layer._replace(wkv=layer.wkv.double()) for layer in zeros)
    return state_of(tensors, zeros, family.rows_are_keys, "the test")


def loss_of(logits):
    """A number that depends on every logit (B, T, V) with a different weight."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (logits.double() * weights).mean()


def gradients(model, loss):
    """{key: gradient} of the time states."""
    states = {key: parameter for key, parameter in model.named_parameters() if is_time_state(key)}
    return dict(zip(states, torch.autograd.grad(loss, list(states.values()))))


@PARTS
@pytest.mark.parametrize("packed", [False, True])
def test_every_sequence_begins_at_the_states(family, packed, parts):
    model, tensors = shaken(family, parts=parts)
    tokens = torch.randint(30, (1, BOUNDS[-1]) if packed else (3, 7))
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32) if packed else None
    given = {key: tensor.clone().requires_grad_() for key, tensor in tensors.items()}
    own = {key: tensor for key, tensor in model.state_dict().items() if not is_time_state(key)}
    documents = tokens[0].tensor_split(BOUNDS[1:-1]) if packed else tokens
    plain = [PLAIN[family.version](own, model.config, document, given) for document in documents]
    logits, due = model(tokens, cu_seqlens=cu_seqlens)[0], torch.cat(plain).view(*tokens.shape, -1)
    torch.testing.assert_close(logits, due, rtol=1e-9, atol=1e-12)
    found, expected = gradients(model, loss_of(logits)), torch.autograd.grad(loss_of(due), list(given.values()))
    assert found.keys() == given.keys()
    for key, tensor in zip(given, expected):
        torch.testing.assert_close(found[key], tensor, rtol=1e-8, atol=1e-12)


def test_the_states_are_those_that_others_take_from_the_model(family):
    model, tensors = shaken(family)
    tokens = torch.randint(30, (2, 5))
    start = model.tuned_states()
    given = zip(in_model(family, model, tensors), start)
    assert all(torch.equal(due, found) for layers in given for due, found in zip(*layers))
    expected = model(tokens)[0]
    for block in model.blocks:
        block.att.untrained = block.ffn.untrained = True
    assert not torch.allclose(model(tokens)[0], expected, rtol=1e-2)
    torch.testing.assert_close(model(tokens, start.repeated(2))[0], expected, rtol=1e-12, atol=0)


def test_sequences_beyond_the_states_that_are_given_begin_anew(family):
    model, _ = shaken(family)
    tokens = torch.randint(30, (1, 20))
    whole, last = model(tokens, cu_seqlens=torch.tensor([0, 9, 14, 20], dtype=torch.int32))
    _, carried = model(tokens[:, :6])
    rest, state = model(tokens[:, 6:], carried, torch.tensor([0, 3, 8, 14], dtype=torch.int32))
    torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state[1].wkv, last[1].wkv, rtol=1e-6, atol=1e-9)


def test_a_start_with_a_part_that_is_not_tuned_is_refused(family):
    model, tensors = shaken(family)
    with pytest.raises(UserError, match="have att.shift, which --state_parts wkv leaves out; give"):
        model.tune_states(in_model(family, model, tensors), ("wkv",))


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("head_size, T", [(8, 1), (8, 37), (4, 70)])
def test_kernels_give_the_states_the_gradient_of_float64(family, dtype, limit, head_size, T):
    model, _ = shaken(family, head_size)
    tokens = torch.randint(30, (2, T))
    expected = gradients(model, loss_of(model(tokens)[0]))
    found = gradients(model.to(dtype), loss_of(model(tokens)[0]))
    for key, tensor in expected.items():
        assert (found[key].double() - tensor).norm() <= limit * tensor.norm(), key
