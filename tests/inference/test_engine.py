"""The engine: a completion is that of `generate`, whatever shares its batch and whatever is cached of its prompt."""

import queue
import re
from types import SimpleNamespace

import pytest
import torch

import rwkv_peft as rp
from families import shaken
from inference.engines import GREEDY, PROMPTS, Recording, ask, engine_of, finish, model_file
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.methods import adapter_parameter
from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.adapters import AdapterSource
from rwkv_peft.checkpoints.base import base_of, open_base, save_model
from rwkv_peft.cli.names import STATE_PARTS
from rwkv_peft.config import AdapterConfig
from rwkv_peft.inference import engine
from rwkv_peft.inference.batch import DAMAGED, LOST
from rwkv_peft.inference.decode import generate
from rwkv_peft.inference.engine import MOST, PrefillBudget
from rwkv_peft.inference.forward import prefill, repeats
from rwkv_peft.inference.loading import load_model, save_state_file
from rwkv_peft.inference.requests import Completion, GenerationRequest, PrefixCache
from rwkv_peft.inference.serve.service import EngineThread
from rwkv_peft.inference.settings import Sampling
from rwkv_peft.inference.speakers import Speaker, adapter_speaker, mixed_speaker, state_speaker
from rwkv_peft.models import family_named
from rwkv_peft.models.layout import is_time_state
from rwkv_peft.models.rwkv6.model import RWKV6
from rwkv_peft.release.merge import MergeOptions, merged_tensors
from rwkv_peft.training.step.shared_prefix import Contexts

SAMPLINGS = [
    GREEDY,
    Sampling(top_p=1.0, temperature=1.5, presence_penalty=1.0, frequency_penalty=0.5, penalty_decay=0.9, seed=4),
    *(Sampling(top_k=7, top_p=0.95, seed=2), Sampling(seed=1), Sampling(seed=9)),
]
METHODS = [{"mode": "bat-in"}, {"mode": "bone", "train_parts": ("ln", "head")}]
METHODS += [{"method": "lora", "alpha": 16.0, "train_parts": ("state",)}, {"method": "pissa"}]
METHODS += [{"method": "dora"}, {"mode": "bat-out"}]
MIXES = [((number, scale),) for number in range(len(METHODS)) for scale in (0.7, -0.5)]
MIXES += [((0, 0.7), (1, 0.3)), ((4, 0.6), (5, -0.2), (2, 0.5), (0, 1.3)), ((1, 0.5), (3, 0.5))]
NAMES = [f"{number}.safetensors" for number in range(len(METHODS))]


def adapter_file(base, path, seed=0, size=0.1, **settings):
    """An adapter of every layer of a base."""
    config = AdapterConfig(rank=8, **({"mode": "bat-in"} | settings if "method" not in settings else settings))
    base = open_base(base)
    adapted = RWKV6(base.config)
    adapted.load_state_dict(base.tensors)
    if "state" in config.train_parts:
        adapted.tune_states(parts=STATE_PARTS)
    inject(adapted, config, family=family_named("x060"))
    if "state" in config.train_parts:
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or is_time_state(name))
    torch.manual_seed(seed)
    trained = {name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad}
    tensors = {name: tensor + size * torch.randn(tensor.shape) for name, tensor in trained.items()}
    tensors |= {name: buffer for name, buffer in adapted.named_buffers() if adapter_parameter(name)}
    save_adapter(path, tensors, AdapterMetadata.from_config(config, base_fingerprint=base.fingerprint))
    return path


@pytest.fixture(scope="module")
def files(tiny_state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speakers")
    model_file(tiny_state, folder / "base.pth")
    for number, settings in enumerate(METHODS):
        adapter_file(folder / "base.pth", folder / NAMES[number], number, **settings)
    return folder


@pytest.fixture(scope="module")
def plain(files):
    return Speaker("base", *load_model(files / "base.pth"))


@pytest.fixture(scope="module")
def growing():
    """A random float64 model with a State that grows (x070b), in which nothing is zero."""
    model = shaken(family_named("x070b"), 0.3, seed=2, n_embd=32, vocab_size=80, head_size=16)
    return Speaker("base", model.double().requires_grad_(False))


@pytest.fixture(params=["plain", "growing"])
def speaker(request):
    return request.getfixturevalue(request.param)


def alone(speaker, prompt, sampling=GREEDY, max_tokens=12):
    return [step.token for step in generate(speaker.model, [prompt], sampling, max_tokens, start=speaker.start)]


@pytest.mark.parametrize("batch, piece, overlap", [(8, 64, False), (8, 64, True), (2, 4, True), (1, 1, False)])
def test_completions_are_those_of_generate_whatever_shares_the_batch(speaker, batch, piece, overlap):
    running, listeners = engine_of(speaker, batch, piece, overlap), []
    for prompt, sampling in zip(PROMPTS, SAMPLINGS):  # each joins while those before it are running
        listeners += ask(running, speaker, prompt, sampling, max_tokens=8)
        running.step()
    finish(running)
    for listener, prompt, sampling in zip(listeners, PROMPTS, SAMPLINGS):
        assert listener.tokens == alone(speaker, prompt, sampling, 8) and listener.end == "length"


def test_several_completions_read_their_prompt_once(plain):
    running, samplings = engine_of(plain), [Sampling(top_p=1.0, seed=seed) for seed in range(3)]
    listeners = ask(running, plain, PROMPTS[2], *samplings)
    finish(running)
    assert running.read == len(PROMPTS[2])
    assert [one.tokens for one in listeners] == [alone(plain, PROMPTS[2], sampling) for sampling in samplings]


def test_the_next_turn_reads_only_new_tokens(speaker):
    running = engine_of(speaker)
    (first,) = ask(running, speaker, PROMPTS[2], GREEDY, max_tokens=8)
    finish(running)
    turn = [*PROMPTS[2], *first.tokens, 5, 6]
    (second,) = ask(running, speaker, turn, GREEDY, max_tokens=4)
    finish(running)
    assert running.read == len(PROMPTS[2]) + 3  # the last token of the completion was sampled and not read
    assert running.reused == len(turn) - 3 and second.tokens == alone(speaker, turn, max_tokens=4)
    (again,) = ask(running, speaker, turn, Sampling(seed=7), max_tokens=4)
    finish(running)
    assert running.reused == 2 * len(turn) - 3 and again.tokens == alone(speaker, turn, Sampling(seed=7), 4)


def test_prompts_that_begin_alike_share_the_state_at_a_mark(plain):
    running = engine_of(plain)
    for number in range(4):
        prompt = [1, 2, 3, number * 9 + 4, 9, 9]
        (listener,) = ask(running, plain, prompt, GREEDY, marks=(3,))
        finish(running)
        assert running.reused == 3 * number and listener.tokens == alone(plain, prompt)


def test_a_growing_state_is_cached_in_its_own_length(growing):
    running = engine_of(growing)
    for prompt in PROMPTS[1:3]:
        ask(running, growing, prompt, GREEDY, max_tokens=8)
    finish(running)
    found = {prefix.length: prefix.state[0].past_keys.shape[1] for prefix in running.cache.prefixes.values()}
    assert found == {size: size for size in (1, 8, 9, 16)} and not repeats(growing.model)
    begun = [[4, 7, 7], [1], [9, 9]]  # states of other lengths serve one pass
    logits, after = prefill(growing.model, PROMPTS[:3], prefill(growing.model, begun)[1])
    for start, prompt, row in zip(begun, PROMPTS, logits):
        torch.testing.assert_close(row, growing.model(torch.tensor([start + prompt]))[0][0, -1])
    assert after[1].length.tolist() == [6, 2, 11]


def test_a_long_prompt_delays_no_other_completion(plain):
    running = engine_of(plain, piece=8)
    (first,) = ask(running, plain, [1], GREEDY, max_tokens=100)
    running.step()
    (long,), (short,) = ask(running, plain, [3] * 80, GREEDY), ask(running, plain, [4] * 3, GREEDY, max_tokens=3)
    for _ in range(5):
        before = len(first.tokens)
        running.step()
        assert len(first.tokens) == before + 1
    assert not long.tokens and short.end == "length"


def test_a_cancelled_completion_frees_its_place_at_once(plain):
    running = engine_of(plain, batch=1)
    (first,) = ask(running, plain, PROMPTS[0], GREEDY, max_tokens=10**6)
    (second,), (third,) = (ask(running, plain, prompt, GREEDY) for prompt in PROMPTS[1:3])
    running.step()
    assert running.places_taken == 1 and len(running.waiting) == 2 and not second.tokens
    first.gone = second.gone = True
    finish(running)
    assert first.end == second.end == "gone" and not second.tokens
    assert third.tokens == alone(plain, PROMPTS[2])
    (ended,) = ask(running, plain, PROMPTS[0], GREEDY, most=3)
    finish(running)
    assert ended.end == "enough" and ended.tokens == alone(plain, PROMPTS[0])[:3]


def test_logprobs_are_the_models(plain):
    running, listener, prompt = engine_of(plain), Recording(), PROMPTS[2]
    completion = Completion(Sampling(temperature=0.5, presence_penalty=2.0, top_logprobs=3), 5, listener)
    running.add(GenerationRequest(plain, prompt, [completion]))
    finish(running)
    whole = prompt + listener.tokens
    due = plain.model(torch.tensor([whole]))[0][0].log_softmax(-1)
    for place, found in enumerate(listener.logprobs, start=len(prompt) - 1):
        assert found.logprob == pytest.approx(due[place, whole[place + 1]].item(), abs=1e-4)
        values, tokens = due[place].topk(len(found.top))
        assert [token for token, _ in found.top] == tokens.tolist()
        torch.testing.assert_close(torch.tensor([value for _, value in found.top]), values, rtol=0, atol=1e-4)
    assert len(listener.logprobs[0].top) == 3


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=3)], ids=["greedy", "top_p", "top_k"])
def test_damaged_logits_end_their_sequence_alone(plain, sampling):
    state = dict(plain.model.state_dict())
    state["emb.weight"] = state["emb.weight"].clone()
    state["emb.weight"][3] = float("nan")
    broken = RWKV6(base_of(state).config)
    broken.load_state_dict(state)
    bad, running = Speaker("bad", broken.requires_grad_(False)), engine_of(plain)
    for other in (GREEDY, sampling):
        (wrong,), (right,) = ask(running, bad, [3], sampling), ask(running, bad, [1], other, max_tokens=2)
        finish(running)
        assert wrong.end == DAMAGED and not wrong.tokens and len(right.tokens) == 2


def test_a_lost_constraint_ends_its_sequence(plain):
    running, listener = engine_of(plain), Recording()
    follows = iter((True, False))
    constraint = SimpleNamespace(allowed=lambda: torch.ones(1, dtype=torch.bool), accept=lambda token: next(follows))
    running.add(GenerationRequest(plain, [1], [Completion(GREEDY, 9, listener, constraint=constraint)]))
    finish(running)
    assert listener.end == LOST and len(listener.tokens) == 1


@pytest.mark.parametrize("failing", ["longest", "add", "_turn", "_begin"])
def test_an_error_ends_each_completion_once_but_those_that_wait(plain, monkeypatch, failing):
    running, calls = engine_of(plain, batch=2), []
    owner = running.cache if hasattr(running.cache, failing) else running
    whole = getattr(owner, failing)

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == (1 if failing.startswith("_") else 2):
            raise MemoryError
        return whole(*arguments)

    listeners = [ask(running, plain, prompt, GREEDY, max_tokens=1)[0] for prompt in PROMPTS[:3]]
    monkeypatch.setattr(owner, failing, fail)
    with pytest.raises(MemoryError):
        finish(running)
    running.fail("failed")
    assert listeners[1].end == "failed" and not listeners[2].end
    finish(running)
    assert listeners[0].end and listeners[2].end == "length" and not running._open


def test_adapters_and_states_answer_side_by_side_as_each_alone(files, plain):
    base = open_base(files / "base.pth")
    save_state_file(files / "state.pth", prefill(plain.model, [[9, 9, 1]])[1], plain.model)
    speakers = [plain, state_speaker("state", files / "state.pth", plain, base)]
    speakers += [adapter_speaker(name, AdapterSource(files / name), plain, base, False) for name in NAMES]
    running = engine_of(plain, batch=12)
    listeners = [ask(running, own, prompt, GREEDY)[0] for own in speakers for prompt in PROMPTS[:2]]
    running.step()
    assert len(running.batches) <= 1 + len(METHODS)
    finish(running)
    merged = [Speaker("", *load_model(files / "base.pth", [AdapterSource(files / name)])) for name in NAMES]
    due = [alone(own, prompt) for own in [*speakers[:2], *merged] for prompt in PROMPTS[:2]]
    assert [one.tokens for one in listeners] == due and len(set(map(tuple, due))) == len(due)


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_adapters_at_scales_compute_what_their_merge_does(files, plain, mix):
    base = open_base(files / "base.pth")
    parts = [
        (adapter_speaker(NAMES[n], AdapterSource(files / NAMES[n]), plain, base, False), scale) for n, scale in mix
    ]
    mixed = mixed_speaker("mix", parts, plain, base)
    merged, start = load_model(base.path, [AdapterSource(files / NAMES[n], amount=scale) for n, scale in mix])
    (found, state), (due, after) = prefill(mixed.model, PROMPTS, mixed.start), prefill(merged, PROMPTS, start)
    torch.testing.assert_close(found, due, rtol=1e-4, atol=1e-4)
    step = torch.tensor([[7]] * len(PROMPTS))
    torch.testing.assert_close(mixed.model(step, state)[0], merged(step, after)[0], rtol=1e-4, atol=1e-4)
    shared = {tensor.data_ptr() for tensor in plain.model.state_dict().values()}
    copies = [key for key, tensor in mixed.model.state_dict().items() if tensor.data_ptr() not in shared]
    assert all(re.search(r"^head|\bln", key) for key in copies) or any(n == 3 for n, _ in mix)  # pissa's are merged


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_merged_weights_are_rounded_to_the_models_dtype_alone(files, tmp_path, method):
    """Whatever the base's file has: bfloat16 of the file does not reach a float32 model."""
    tensors = {key: tensor.bfloat16() for key, tensor in open_base(files / "base.pth").tensors.items()}
    save_model(tmp_path / "base.pth", tensors)
    source = AdapterSource(adapter_file(tmp_path / "base.pth", tmp_path / "own.safetensors", method=method))
    base = open_base(tmp_path / "base.pth")
    exact = merged_tensors(base, [(source.path, source.read(base.tensors))], MergeOptions(torch.float32))
    own = adapter_speaker("own", source, Speaker("base", *load_model(base.path)), base, False)
    loaded = rp.load(base.path, adapters=[source.path], precision="fp32", tokenizer="bytes")
    for weights in (own.model.state_dict(), loaded.network.state_dict()):
        assert all(torch.equal(weights[key], tensor) for key, tensor in exact.items())


def test_adapters_share_the_bases_weights_and_leave_them_unchanged(files, plain):
    base = open_base(files / "base.pth")
    before = {key: tensor.clone() for key, tensor in plain.model.state_dict().items()}
    places = {key: tensor.data_ptr() for key, tensor in plain.model.state_dict().items()}
    for name, settings in zip(NAMES, METHODS):
        weights = adapter_speaker("own", AdapterSource(files / name), plain, base, False).model.state_dict()
        copies = {key for key in before if weights[key].data_ptr() != places[key]}
        if settings.get("method") != "pissa":
            trains = "ln" in settings.get("train_parts", ())
            assert copies == {key for key in before if trains and re.search(r"^head|\bln", key)}
    assert all(torch.equal(before[key], tensor) for key, tensor in plain.model.state_dict().items())


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def read(budget, clock, tokens, seconds):
    budget.begin(tokens)
    clock.now += seconds
    budget.end()
    budget.leave()


@pytest.mark.parametrize("waiting, running, steps", [(1, 10, 1.1), (20, 44, 64 / 44), (63, 1, 1.5), (64, 0, 8)])
@pytest.mark.parametrize("rate", [400.0, 8000.0])
def test_a_pass_over_prompts_takes_about_the_seconds_of_those_who_wait(clock, rate, waiting, running, steps):
    """Of a step, times the sequences for each that is sampled: by a real number, and at most 1.5 times. While none
    is sampled, nobody's next token waits."""
    budget = PrefillBudget(64, 0.1)
    for _ in range(20):
        tokens = budget.due(0, 1)
        read(budget, clock, tokens, tokens / rate)
    assert budget.due(waiting, running) == pytest.approx(min(0.1 * rate * steps, MOST), rel=0.1)


@pytest.mark.parametrize("weights", [0.02, 0.2])
def test_a_budget_does_not_pay_for_reading_the_weights(clock, weights):
    """Which each pass does, so that few tokens a pass would take as long: those of `seconds` are read besides."""
    budget = PrefillBudget(64, 0.1)
    for _ in range(20):
        for tokens in (8, budget.due(0, 1)):
            read(budget, clock, tokens, weights + tokens / 1000)
    assert 99 <= budget.due(0, 1) <= 110


def test_a_budget_does_not_pay_for_joining_the_batch(plain, clock, monkeypatch):
    def reading(model, pieces, state, whole=engine.read_packed):
        clock.now += sum(map(len, pieces)) / 1000
        return whole(model, pieces, state)

    def joining(*batches, whole=engine.ModelBatch.join):
        clock.now += 0.5
        whole(*batches)

    monkeypatch.setattr(engine, "read_packed", reading)
    monkeypatch.setattr(engine.ModelBatch, "join", joining)
    running = engine_of(plain, batch=40)
    running.budget = PrefillBudget(64, 0.1)
    for number in range(40):
        ask(running, plain, [number + 1] * 16, GREEDY, max_tokens=4)
    finish(running)
    assert 64 < running.budget.tokens <= 100


def test_a_piece_of_a_prompt_takes_as_long_as_a_step_of_the_batch(clock):
    budget = PrefillBudget(64, 0.1)
    read(budget, clock, 64, 0.1)
    for own, tokens in ((0.5, 320), (0.02, 96), (60.0, MOST)):
        clock.now += own
        assert budget.due(10, 20) == pytest.approx(tokens, abs=1)
        budget.leave()


def test_requests_that_come_together_are_read_together():
    """A thread without work waits a moment for the next request, and for the one behind it."""
    done, pause = list[str](), object()
    script = [lambda: done.append("one"), lambda: done.append("two"), pause, lambda: done.append("three"), None]

    class Calls:
        def empty(self):
            return True

        def get(self, timeout=None):
            if script[0] is pause and timeout is not None:
                del script[0]
                raise queue.Empty
            return script.pop(0)

    thread = EngineThread(SimpleNamespace(busy=False, step=lambda: done.append("step")), lambda: None)
    thread._calls = Calls()
    thread.run()
    assert done == ["one", "two", "step", "three"]


def test_prefixes_are_cached_up_to_a_limit_and_the_latest_used_stay(plain):
    logits, state = prefill(plain.model, [[1]])
    cache = PrefixCache(1 << 30)
    cache.add(plain, [1], logits, state)
    one = cache.size
    cache.limit = 2 * one + 100
    cache.add(plain, [2], logits, state)
    assert cache.longest(plain, [1, 5]).length == 1
    cache.add(plain, [3], logits, state)
    assert cache.longest(plain, [2]) is None and cache.longest(plain, [1]) and cache.longest(plain, [3, 1])
    assert cache.size == 2 * one and cache.longest(Speaker("other", plain.model), [1]) is None


def test_a_teacher_reads_rows_behind_contexts_of_other_lengths(growing):
    texts, rows, contexts = [torch.tensor([3, 1, 4]), torch.tensor([5])], [[6, 7], [8, 9, 2]], Contexts(room=1)
    seen = {"tokens": torch.tensor([sum(rows, [])]), "cu_seqlens": torch.tensor([0, 2, 5]), "contexts": texts}
    found = contexts.forward(growing.model, seen, lambda x, weight: x @ weight.t())
    due = [growing.model(torch.tensor([[*text.tolist(), *row]]))[0][:, len(text) :] for text, row in zip(texts, rows)]
    torch.testing.assert_close(found, torch.cat(due, 1))
    assert len(contexts.cache) == 1  # the last one, though the first was larger
