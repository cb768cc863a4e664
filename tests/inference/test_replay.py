"""Replayed graphs sample, a token ahead of the host, the tokens that are sampled without them, with few launches."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from families import shaken
from inference.engines import Recording
from inference.graphs_emulated import REFUSED, Graph, emulate
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.inference import forward
from rwkv_peft.inference import sampling as sampling_module
from rwkv_peft.inference.chat import Session
from rwkv_peft.inference.engine import Engine
from rwkv_peft.inference.forward import GraphedForward
from rwkv_peft.inference.requests import Completion, GenerationRequest, PrefixCache
from rwkv_peft.inference.settings import Sampling
from rwkv_peft.inference.speakers import Speaker
from rwkv_peft.inference.weights import quantize_products
from rwkv_peft.models import FAMILIES, family_named
from rwkv_peft.models.state import grows
from rwkv_peft.ops.decode import cpu as decode

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
        monkeypatch.setattr(decode.FAMILY, "takes", lambda *_: False)
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
    [*zip(SAMPLINGS, (10, 22, 20)), (SAMPLINGS[4], 20)],
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
    assert Graph.replays == before + 1
    host = [name for name in counting.names if name in REFUSED]
    assert set(host) <= {"lift_fresh"}, host  # a list of the host's, which is pinned for a GPU
    assert len(counting.names) <= launches, counting.names


def test_what_cannot_be_recorded_is_told_and_computed(model, monkeypatch, capsys):
    plain, _ = answers(model, overlap=False)

    def refuse(*_, **__):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(forward, "recordable", lambda model: True)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    assert [tokens for tokens, _ in answers(model, overlap=True)[0]] == [tokens for tokens, _ in plain]
    assert capsys.readouterr().err.count("without CUDA graphs") == 1


def test_more_rows_than_a_graph_has_are_computed_without(model, monkeypatch):
    monkeypatch.setattr(forward, "LARGEST_GRAPH", 2)
    graphs = GraphedForward(model, 3)
    with torch.inference_mode():
        due, state = model(torch.tensor([[1], [2], [3]]))
        found, _ = graphs(torch.tensor([[1], [2], [3]]), state)
        assert not graphs.graphs and torch.equal(found, model(torch.tensor([[1], [2], [3]]), state)[0])
