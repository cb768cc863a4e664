"""Steps by a tape of kernels and by replayed graphs are the model's own forward."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from families import shaken
from inference.engines import Recording
from inference.graphs_emulated import REFUSED, Graph, emulate
from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.inference import forward
from rwkv_peft.inference import sampling as sampling_module
from rwkv_peft.inference.chat import Session
from rwkv_peft.inference.engine import Engine
from rwkv_peft.inference.forward import RECORDS, GraphedDraw, GraphedForward, TapedForward, forward_of, prefill
from rwkv_peft.inference.loading import load_model
from rwkv_peft.inference.requests import Completion, GenerationRequest, PrefixCache
from rwkv_peft.inference.sampling import sample, selects
from rwkv_peft.inference.settings import Sampling
from rwkv_peft.inference.speakers import Speaker
from rwkv_peft.inference.weights import quantize_products
from rwkv_peft.models import FAMILIES, family_named
from rwkv_peft.models.state import grows
from rwkv_peft.ops import decode
from rwkv_peft.ops.decode import MOST_ROWS

PRECISIONS = {"fp32": dict(), "bf16": dict(precision="bf16"), "int8": dict(weights="int8")}


@pytest.fixture(scope="module", params=RECORDS)
def path(request, tmp_path_factory):
    if reason := decode.CPU.unavailable():
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


VOCABULARY = 257
FIXED = [family for family in FAMILIES if not grows(family.new_dimensions(2, 64, VOCABULARY))]
SAMPLINGS = [Sampling(temperature=0), Sampling(top_p=1.0, seed=3, measured=True), Sampling(top_k=5, seed=1)]
SAMPLINGS += [Sampling(presence_penalty=1.0, temperature=0), Sampling(top_p=0.5, seed=2)]


@pytest.fixture
def model(monkeypatch):
    emulate(monkeypatch.setattr)
    return make(family_named("x070"))


def make(family, channels=16):
    return shaken(family, 0.3, n_embd=channels, vocab_size=VOCABULARY).requires_grad_(False).eval()


def answers(model, overlap):
    """The tokens and logprobs of requests that come and go, more of them than places; and the engine."""
    running, listeners = Engine(VOCABULARY, 6, PrefixCache(1 << 20), overlap=overlap), []
    speaker = Speaker("", model)
    for number in range(5):
        listeners.append([Recording() for _ in range(1 + number % 3)])
        sampling = SAMPLINGS[number % len(SAMPLINGS)]
        asked = [Completion(sampling.seeded(place), 2 + number, one) for place, one in enumerate(listeners[-1])]
        running.add(GenerationRequest(speaker, [number + 1, 7, 9], asked))
        if number > 2:
            running.step()
    while running.busy:
        running.step()
    assert all(one.end == "length" for group in listeners for one in group)
    return [(one.tokens, one.logprobs) for group in listeners for one in group], running


@pytest.mark.parametrize("family, weights", [*((family, None) for family in FIXED), (family_named("x070"), "int8")])
def test_replayed_tokens_and_states_are_those_of_the_model(family, weights, monkeypatch):
    model = make(family, 32 if weights else 16)
    if weights:
        quantize_products(model, weights, lambda text: None)
        monkeypatch.setattr(decode.CPU, "takes", lambda *_: False)
    with monkeypatch.context() as patch:
        emulate(patch.setattr)
        plain, _ = answers(model, overlap=False)
        patch.setattr(forward, "recordable", lambda model: True)
        found, running = answers(model, overlap=True)
    (graphs,) = running.forwards.values()
    assert set(graphs.graphs) == {2, 4, 8}
    for (tokens, logprobs), (due, told) in zip(found, plain):
        assert tokens == due
        for one, other in zip(logprobs, told):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
                assert one.entropy == pytest.approx(other.entropy, abs=1e-5)
    for (_, text), read in running.cache.prefixes.items():
        tokens = torch.frombuffer(bytearray(text), dtype=torch.int32).long()[None]
        logits, state = model(tokens)
        torch.testing.assert_close(read.logits, logits[:, -1], rtol=1e-4, atol=1e-4)
        for layer, due in zip(read.state, state):
            torch.testing.assert_close(tuple(layer), tuple(due), rtol=1e-4, atol=1e-4)


def test_a_chat_remembers_what_it_said(model, monkeypatch):
    def said():
        session = Session(model, BytesTokenizer(), Sampling(temperature=0))
        texts = ["".join(session.answer([f"{turn}?"], ["\n"], 4)) for turn in range(2)]
        session.close()
        return texts, session.state

    texts, state = said()
    monkeypatch.setattr(forward, "recordable", lambda model: True)
    again, replayed = said()
    assert again == texts
    for layer, due in zip(replayed, state):
        torch.testing.assert_close(tuple(layer), tuple(due), rtol=1e-4, atol=1e-4)


class Counting(TorchDispatchMode):
    """The operations that a GPU is asked for, without those of a replay."""

    def __init__(self):
        super().__init__()
        self.names, self.inside = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not self.inside:
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "sampling, launches",
    [*zip(SAMPLINGS, (10, 22, 20)), (SAMPLINGS[4], 15)],
    ids=["greedy", "measured", "top_k", "top_p"],
)
def test_a_step_is_one_graph_and_few_launches_and_waits_for_nothing(model, monkeypatch, sampling, launches):
    monkeypatch.setattr(forward, "recordable", lambda model: True)
    for name in ("FIRST_CANDIDATES", "SPAN"):
        monkeypatch.setattr(sampling_module, name, VOCABULARY + 1)  # all at once, as on a GPU
    running, listeners = Engine(VOCABULARY, 4, overlap=True), [Recording() for _ in range(4)]
    running.add(
        GenerationRequest(Speaker("", model), [5], [Completion(sampling, 99, listener) for listener in listeners])
    )
    for _ in range(3):
        running.step()
    counting, replaying = Counting(), Graph.replay

    def replay_uncounted(graph):
        counting.inside = True
        replaying(graph)
        counting.inside = False

    monkeypatch.setattr(Graph, "replay", replay_uncounted)
    before = Graph.replays
    with counting:
        running.step()
    assert Graph.replays == before + 1 + selects(sampling)
    host = [name for name in counting.names if name in REFUSED]
    assert set(host) <= {"lift_fresh"}, host  # a list of the host's, which is pinned for a GPU
    assert len(counting.names) <= launches, counting.names


def test_a_draw_with_top_p_is_one_graph_for_all_settings_and_as_sorting_draws(model):
    """And some launches in it, however many rows and tokens it draws from."""
    draw, generator = GraphedDraw(1001, 7, torch.device("cpu")), torch.Generator().manual_seed(1)
    settings = [dict(top_p=0.7), dict(top_p=0.2, temperature=3), dict(top_p=0.9, min_p=0.1), dict(top_k=5), {}]
    settings += [dict(temperature=0), dict(top_p=1.0), dict(top_p=0.95, min_p=0.5, temperature=0.3)]
    for n in (7, 1, 3, 2, 9):
        for sampling in (Sampling(**each) for each in settings):
            logits = 4 * torch.randn(n, 1001, generator=generator)
            uniforms = torch.rand(n, dtype=torch.float64, generator=generator)
            assert torch.equal(draw(logits, uniforms, sampling), sample(logits, uniforms, sampling)), sampling
    assert set(draw.graphs) == {(size, numbers) for size in (1, 2, 4, 8) for numbers in (2, 3)}  # 9 rows: without
    assert all(len(graph.calls) <= 57 + 6 * (numbers - 2) for (_, numbers), (graph, _) in draw.graphs.items())


def test_weights_that_train_are_recorded_and_followed_through_steps(model):
    """But those that stage 3 gathers for a pass, or a model with hooks."""
    parameters, tokens = [*model.requires_grad_().parameters()], torch.tensor([[1], [2], [3]])
    assert forward.repeats(model)
    graphs, optimizer = GraphedForward(model, 3), torch.optim.AdamW(parameters, lr=0.1)
    with torch.no_grad():
        _, state = model(tokens)
        before = graphs(tokens, state)[0].clone()
    model(tokens)[0].square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        due, after = model(tokens, state)
        logits, advanced = graphs(tokens, state)
    torch.testing.assert_close(logits, due)
    for layer, right in zip(advanced, after):
        torch.testing.assert_close(tuple(layer), tuple(right))
    assert [*graphs.graphs] == [4] and not torch.allclose(logits, before)
    hook = model.head.register_forward_hook(lambda *_: None)
    assert not forward.repeats(model)
    hook.remove()
    parameters[0].ds_id = 0
    assert not forward.repeats(model)


def test_what_cannot_be_recorded_is_told_and_computed(model, monkeypatch, capsys):
    plain, _ = answers(model, overlap=False)

    def refuse(*_, **__):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(forward, "recordable", lambda model: True)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    assert [tokens for tokens, _ in answers(model, overlap=True)[0]] == [tokens for tokens, _ in plain]
    printed = capsys.readouterr().err
    assert printed.count("without CUDA graphs") == 2  # once each
    assert "cannot record what the model does" in printed and "cannot record how tokens are drawn" in printed


def test_more_rows_than_a_graph_has_are_computed_without(model, monkeypatch):
    monkeypatch.setattr(forward, "LARGEST_GRAPH", 2)
    graphs = GraphedForward(model, 3)
    with torch.inference_mode():
        due, state = model(torch.tensor([[1], [2], [3]]))
        found, _ = graphs(torch.tensor([[1], [2], [3]]), state)
        assert not graphs.graphs and torch.equal(found, model(torch.tensor([[1], [2], [3]]), state)[0])
