"""A step by a tape of kernels: logits and states are those of the model's own forward, of every recorded generation."""

import pytest
import torch

from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.inference.forward import RECORDS, TapedForward, forward_of, prefill
from rwkv_peft.inference.loading import load_model
from rwkv_peft.models import family_named
from rwkv_peft.ops.decode import MOST_ROWS
from rwkv_peft.ops.decode.cpu import FAMILY

PRECISIONS = {"fp32": dict(), "bf16": dict(precision="bf16"), "int8": dict(weights="int8")}


@pytest.fixture(scope="module", params=RECORDS)
def path(request, tmp_path_factory):
    if reason := FAMILY.unavailable():
        pytest.skip(reason)
    family, generator = family_named(request.param), torch.Generator().manual_seed(0)
    shapes = family.shapes(family.new_dimensions(n_layer=3, n_embd=128, vocab_size=81))
    drawn = {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    tensors = {key: tensor + ("ln" in key and key.endswith("weight")) for key, tensor in drawn.items()}
    save_model(path := tmp_path_factory.mktemp(request.param) / "model.pth", tensors)
    return path


def walk(forward, state, tokens):
    """Logits of each of some steps (T, n, V), and the last State."""
    found = []
    for column in tokens.unbind(1):
        logits, state = forward(column[:, None], state)
        found.append(logits[:, 0])
    return torch.stack(found), state


def distance(found, due):
    return ((found.double() - due.double()).norm() / due.double().norm()).item()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_steps_are_the_models_own(path, precision):
    """The tape's distance from the float32 model is what the plain form's is, which rounds at the same places."""
    model, _ = load_model(path, **PRECISIONS[precision])
    assert isinstance(model.forward, TapedForward)
    exact = load_model(path)[0].forward.plain if precision == "bf16" else model.forward.plain
    rounding = {"fp32": 1e-5, "bf16": 0.0, "int8": 1e-2}[precision]  # some integers of 8 bits differ
    with torch.inference_mode():
        for rows in (1, 3, MOST_ROWS):
            tokens = torch.randint(81, (rows, 5), generator=torch.Generator().manual_seed(rows))
            _, state = prefill(model, [[2, 3 + row] for row in range(rows)])
            found, after = walk(model, state, tokens)
            plain, plain_after = walk(model.forward.plain, state, tokens)
            due, due_after = walk(exact, [type(layer)(*(x.float() for x in layer)) for layer in state], tokens)
            assert distance(found, due) <= 1.5 * distance(plain, due) + rounding
            for own, theirs, right in zip(after, plain_after, due_after):
                for mine, other, exactly in zip(own, theirs, right):
                    assert mine.shape == other.shape and mine.dtype == other.dtype
                    assert distance(mine, exactly) <= 1.5 * distance(other, exactly) + rounding


def test_results_stay_and_a_state_may_advance_in_its_own_memory(path):
    model, _ = load_model(path)
    tokens = torch.tensor([[5], [9]])
    with torch.inference_mode():
        _, start = prefill(model, [[2], [3]])
        due, after = model(tokens, start)
        results = (due, *(field for layer in after for field in layer))
        before = [x.clone() for x in results]
        model(tokens.flip(0), start)
        assert all(map(torch.equal, before, results))
        found, advanced = forward_of(model, 2)(tokens, start)
    assert torch.equal(found, due)
    for own, theirs, given in zip(advanced, after, start):
        assert own.wkv.data_ptr() == given.wkv.data_ptr()
        assert all(map(torch.equal, own, theirs))


def test_states_that_advance_by_turns(path):
    """Whatever else the tape steps meanwhile, in place or not."""
    model, _ = load_model(path)
    forward, tokens = forward_of(model, 1), torch.tensor([[5]])
    with torch.inference_mode():
        states = [prefill(model, [[first]])[1] for first in (2, 3)]
        due = [list(walk(model, state, tokens.repeat(1, 5))[0]) for state in states]
        for number, in_place in zip((0, 0, 1, 0, 0, 1, 1, 1), (True, True, True, False, True, False, True, True)):
            logits, after = (forward if in_place else model)(tokens, states[number])
            assert torch.equal(logits[:, 0], due[number][0])
            if in_place:
                states[number] = after
                del due[number][0]


def test_states_of_views_and_other_numbers_of_threads(path):
    model, _ = load_model(path)
    tokens, threads = torch.tensor([[5], [9]]), torch.get_num_threads()
    with torch.inference_mode():
        _, state = prefill(model, [[2], [3]])
        logits, _ = model(tokens, state)
        turned = type(state)(layer._make(x.mT.contiguous().mT for x in layer) for layer in state)
        try:
            torch.set_num_threads(3)
            assert torch.equal(model(tokens, turned)[0], logits)
        finally:
            torch.set_num_threads(threads)


def test_the_rest_takes_the_models_own_forward(path):
    """Prompts, many rows, sequences that begin, and passes with gradients; also models that have adapters as layers."""
    model, _ = load_model(path)
    own = []
    model.forward.plain = lambda *given, plain=model.forward.plain, **named: own.append(given) or plain(*given, **named)
    with torch.inference_mode():
        _, state = prefill(model, [[2]])
        assert len(own) == 1
        model(torch.tensor([[5]]), state)
        assert len(own) == 1
        model(torch.tensor([[5, 6]]), state)
        model(torch.tensor([[5]]))
        many = state.repeated(MOST_ROWS + 1)
        model(torch.full((MOST_ROWS + 1, 1), 5), many)
        assert len(own) == 4
    with torch.no_grad():
        model(torch.tensor([[5]]), state)
    assert len(own) == 4
    with torch.inference_mode(False), torch.enable_grad():
        model(torch.tensor([[5]]), type(state)(layer._make(x.clone() for x in layer) for layer in state))
    assert len(own) == 5
