"""States in files: each layout converts back, and a file that is no state of the model is refused."""

import pytest
import torch

from rwkv_peft.cli.errors import UserError
from rwkv_peft.cli.names import STATE_PARTS
from rwkv_peft.models.layout import belongs, state_parts, time_state_shapes
from rwkv_peft.models.rwkv6.keys import new_dimensions
from rwkv_peft.models.state import State, check_time_states, split_time_states, state_of, state_tensors

CONFIG = new_dimensions(n_layer=2, n_embd=32, vocab_size=20, head_size=8)


def random_state(batch=1):
    generator = torch.Generator().manual_seed(0)
    return State(
        type(layer)(*(torch.randn(tensor.shape, generator=generator) for tensor in layer))
        for layer in State.zeros(CONFIG, batch)
    )


def equal(left, right):
    return all(torch.equal(a, b) for layers in zip(left, right) for a, b in zip(*layers))


def test_each_layers_zeros_are_its_own():
    state = State.zeros(CONFIG, 2)
    for tensor in state[0]:
        tensor += 1
    assert all(tensor.all() for tensor in state[0]) and not any(tensor.any() for tensor in state[1])


@pytest.mark.parametrize("rows_are_keys", [True, False])
def test_a_saved_session_leads_back(rows_are_keys):
    state = random_state()
    tensors = state_tensors(state, rows_are_keys)
    assert equal(state_of(tensors, State.zeros(CONFIG, 1), rows_are_keys, "the file"), state)
    wkv = tensors["blocks.1.att.time_state"]
    assert torch.equal(wkv.mT if rows_are_keys else wkv, state[1].wkv[0])  # files have a row for each value


@pytest.mark.parametrize("parts", [("wkv",), ("shift",), ("wkv", "shift")])
def test_parts_that_a_file_does_not_hold_start_at_zero(parts):
    tensors = {key: tensor for key, tensor in state_tensors(random_state(), True).items() if belongs(key, parts)}
    check_time_states(tensors, "the file")
    assert tensors.keys() == time_state_shapes(CONFIG, parts).keys() and state_parts(tensors) == parts
    for layer, given in zip(state_of(tensors, State.zeros(CONFIG, 1), True, "the file"), random_state()):
        for end, found, due in zip(layer.keys(), layer, given):
            assert torch.equal(found, due if belongs(f".{end}", parts) else torch.zeros_like(due))


def test_a_models_own_states_are_told_from_its_parameters():
    tensors = state_tensors(random_state(), True) | {"emb.weight": torch.ones(1)}
    weights, states = split_time_states(tensors)
    assert states.keys() == time_state_shapes(CONFIG, STATE_PARTS).keys() and list(weights) == ["emb.weight"]


def test_sequences_are_chosen_joined_and_repeated():
    state = random_state(batch=3)
    some = state.selected(torch.tensor([2, 0]))
    assert torch.equal(some[1].wkv, state[1].wkv[[2, 0]])
    assert equal(some.joined(state).selected(torch.arange(2, 5)), state)
    assert equal(random_state().repeated(2).selected(torch.tensor([1])), random_state())


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t | {"blocks.2.att.time_state": torch.ones(4, 8, 8)}, "no place for its blocks.2.att.time_state"),
        (lambda t: {key: value for key, value in t.items() if key != "blocks.1.ffn.shift"}, "no blocks.1.ffn.shift"),
        (lambda t: t | {"blocks.0.att.time_state": torch.ones(4, 8, 9)}, "has shape"),
        (lambda t: t | {"blocks.0.att.shift": torch.full((32,), float("nan"))}, "NaN or Inf"),
    ],
)
def test_what_is_no_state_of_the_model_is_told(change, words):
    with pytest.raises(UserError, match=words):
        state_of(change(state_tensors(random_state(), True)), State.zeros(CONFIG, 1), True, "the file")
