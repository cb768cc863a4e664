"""The engine: an answer is that of `generate`, whoever shares its batch and whatever is known of its prompt."""

import re
from types import SimpleNamespace

import pytest
import torch
from engines import GREEDY, PROMPTS, Heard, ask, engine_of, finish, model_file

from rwkv_peft.adapters.inject import inject
from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.adapters import AdapterSource
from rwkv_peft.checkpoints.base import base_of, open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import AdapterConfig
from rwkv_peft.inference.asked import Answer, Request
from rwkv_peft.inference.decode import generate
from rwkv_peft.inference.known import Known
from rwkv_peft.inference.loading import load_model, save_state_file
from rwkv_peft.inference.reading import prefill
from rwkv_peft.inference.rows import DAMAGED, LOST
from rwkv_peft.inference.settings import Sampling
from rwkv_peft.inference.voices import Voice, adapter_voice, state_voice
from rwkv_peft.models import family_named
from rwkv_peft.models.rwkv6.model import RWKV6

MANNERS = [
    Sampling(top_p=1.0, temperature=1.5, presence_penalty=1.0, frequency_penalty=0.5, penalty_decay=0.9, seed=4),
    *(Sampling(top_k=7, top_p=0.95, seed=2), Sampling(seed=1), Sampling(seed=9)),
]
MANNERS = [GREEDY, *MANNERS]
METHODS = [{"mode": "bat-in"}, {"mode": "bone", "train_parts": ("ln", "head")}]
METHODS += [{"method": "lora", "alpha": 16.0, "train_parts": ("state",)}, {"method": "pissa"}]


def adapter_file(base, path, seed=0, size=0.1, **settings):
    """An adapter of every layer of a base."""
    config = AdapterConfig(rank=8, **({"mode": "bat-in"} | settings if "method" not in settings else settings))
    base = open_base(base)
    adapted = RWKV6(base.config)
    adapted.load_state_dict(base.tensors)
    if "state" in config.train_parts:
        adapted.tune_states()
    inject(adapted, config, family=family_named("x060"))
    if "state" in config.train_parts:
        for block in adapted.blocks:
            block.att.time_state.requires_grad_(True)
    torch.manual_seed(seed)
    trained = {name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad}
    tensors = {name: tensor + size * torch.randn(tensor.shape) for name, tensor in trained.items()}
    tensors |= {name: buffer for name, buffer in adapted.named_buffers() if "init_" in name}
    save_adapter(path, tensors, AdapterMetadata.from_config(config, base_fingerprint=base.fingerprint))
    return path


@pytest.fixture(scope="module")
def files(tiny_state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("voices")
    model_file(tiny_state, folder / "base.pth")
    for number, settings in enumerate(METHODS):
        adapter_file(folder / "base.pth", folder / f"{number}.safetensors", number, **settings)
    return folder


@pytest.fixture(scope="module")
def voice(files):
    return Voice("base", *load_model(files / "base.pth"))


def alone(voice, prompt, sampling, max_tokens=12):
    return [step.token for step in generate(voice.model, [prompt], sampling, max_tokens, start=voice.start)]


@pytest.mark.parametrize("batch, piece, ahead", [(8, 64, False), (8, 64, True), (2, 4, True), (1, 1, False)])
def test_answers_are_those_of_generate_whoever_shares_the_batch(voice, batch, piece, ahead):
    running, heard = engine_of(voice, batch, piece, ahead), []
    for prompt, sampling in zip(PROMPTS, MANNERS):  # each joins while those before it are at work
        heard += ask(running, voice, prompt, sampling)
        running.step()
    finish(running)
    for listener, prompt, sampling in zip(heard, PROMPTS, MANNERS):
        assert listener.tokens == alone(voice, prompt, sampling) and listener.end == "length"


def test_several_answers_read_their_prompt_once(voice):
    running = engine_of(voice)
    heard = ask(running, voice, PROMPTS[2], *(Sampling(top_p=1.0, seed=seed) for seed in range(3)))
    finish(running)
    assert running.read == len(PROMPTS[2])
    assert [h.tokens for h in heard] == [alone(voice, PROMPTS[2], Sampling(top_p=1.0, seed=seed)) for seed in range(3)]


def test_the_next_turn_reads_only_what_is_new(voice):
    running = engine_of(voice)
    (first,) = ask(running, voice, PROMPTS[2], GREEDY)
    finish(running)
    turn = [*PROMPTS[2], *first.tokens, 5, 6]
    (second,) = ask(running, voice, turn, GREEDY)
    finish(running)
    assert running.read == len(PROMPTS[2]) + 3  # the last token of the answer was drawn and not read
    assert running.reused == len(turn) - 3 and second.tokens == alone(voice, turn, GREEDY)
    again = ask(running, voice, turn, Sampling(seed=7))[0]
    finish(running)
    assert running.reused == len(turn) - 3 + len(turn) and again.tokens == alone(voice, turn, Sampling(seed=7))


def test_prompts_that_begin_alike_share_the_state_at_a_mark(voice):
    running = engine_of(voice)
    ask(running, voice, [1, 2, 3, 4, 5], GREEDY, marks=(3,))
    finish(running)
    for number in range(1, 4):
        prompt = [1, 2, 3, number * 9, 9, 9]
        (heard,) = ask(running, voice, prompt, GREEDY, marks=(3,))
        finish(running)
        assert running.reused == 3 * number and heard.tokens == alone(voice, prompt, GREEDY)


def test_states_are_kept_up_to_a_limit_and_the_latest_used_stay(voice):
    logits, state = prefill(voice.model, [[1]])
    known = Known(1 << 30)
    known.add(voice, [1], logits, state)
    one = known.size
    known.limit = 2 * one + 100
    known.add(voice, [2], logits, state)
    assert known.longest(voice, [1, 5]).length == 1
    known.add(voice, [3], logits, state)
    assert known.longest(voice, [2]) is None and known.longest(voice, [1]) and known.longest(voice, [3, 1])
    assert known.size == 2 * one and known.longest(Voice("other", voice.model), [1]) is None
    known.forget(voice)
    assert known.size == 0 == len(known.reads)


def test_a_long_prompt_keeps_nobody_waiting(voice):
    running = engine_of(voice, piece=8)
    (speaks,) = ask(running, voice, [1], GREEDY, max_tokens=100)
    running.step()
    (long,) = ask(running, voice, [3] * 80, GREEDY)
    (short,) = ask(running, voice, [4] * 3, GREEDY, max_tokens=3)
    for _ in range(5):
        before = len(speaks.tokens)
        running.step()
        assert len(speaks.tokens) == before + 1
    assert not long.tokens and short.end == "length"


def test_who_is_gone_frees_the_place_at_once(voice):
    running = engine_of(voice, batch=1)
    (first,) = ask(running, voice, PROMPTS[0], GREEDY, max_tokens=10**6)
    (second,) = ask(running, voice, PROMPTS[1], GREEDY)
    (third,) = ask(running, voice, PROMPTS[2], GREEDY)
    running.step()
    assert running.rows == 1 and len(running.waiting) == 2 and not second.tokens
    first.gone = second.gone = True
    finish(running)
    assert first.end == second.end == "gone" and not second.tokens
    assert third.tokens == alone(voice, PROMPTS[2], GREEDY)


def test_a_listener_ends_its_answer(voice):
    running = engine_of(voice)
    (heard,) = ask(running, voice, PROMPTS[0], GREEDY, most=3)
    finish(running)
    assert heard.end == "enough" and heard.tokens == alone(voice, PROMPTS[0], GREEDY)[:3]


def test_odds_are_the_models_log_probabilities(voice):
    running = engine_of(voice)
    heard, scores, prompt = Heard(), [], PROMPTS[2]
    sampling = Sampling(temperature=0.5, presence_penalty=2.0)
    running.add(Request(voice, prompt, [Answer(sampling, 5, heard, 3)], scored=scores.append, top=2))
    finish(running)
    whole = prompt + heard.tokens
    odds = voice.model(torch.tensor([whole]))[0][0].log_softmax(-1)
    for place, found in enumerate([*scores, *heard.odds]):
        assert found.logprob == pytest.approx(odds[place, whole[place + 1]].item(), abs=1e-4)
        values, tokens = odds[place].topk(len(found.top))
        assert [token for token, _ in found.top] == tokens.tolist()
        torch.testing.assert_close(torch.tensor([value for _, value in found.top]), values, rtol=0, atol=1e-4)
    assert len(scores) == len(prompt) - 1 and len(heard.odds[0].top) == 3


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=3)], ids=["greedy", "top_p", "top_k"])
def test_damaged_logits_end_their_row_alone(voice, sampling):
    state = dict(voice.model.state_dict())
    state["emb.weight"] = state["emb.weight"].clone()
    state["emb.weight"][3] = float("nan")
    broken = RWKV6(base_of(state).config)
    broken.load_state_dict(state)
    bad, running = Voice("bad", broken.requires_grad_(False)), engine_of(voice)
    (wrong,), (right,) = ask(running, bad, [3], sampling), ask(running, bad, [1], GREEDY, max_tokens=2)
    finish(running)
    assert wrong.end == DAMAGED and not wrong.tokens and len(right.tokens) == 2
    (wrong,), (right,) = ask(running, bad, [3], sampling), ask(running, bad, [1], sampling, max_tokens=2)
    finish(running)
    assert wrong.end == DAMAGED and not wrong.tokens and len(right.tokens) == 2


def test_a_lost_form_ends_its_row_with_that(voice):
    running, lost = engine_of(voice), Heard()
    follows = iter((True, False))
    held = SimpleNamespace(allowed=lambda: torch.ones(1, dtype=torch.bool), take=lambda token: next(follows))
    running.add(Request(voice, [1], [Answer(GREEDY, 9, lost, held=held)]))
    finish(running)
    assert lost.end == LOST and len(lost.tokens) == 1


def test_adapters_and_states_answer_side_by_side_as_each_alone(files, voice):
    base = open_base(files / "base.pth")
    _, state = prefill(voice.model, [[9, 9, 1]])
    save_state_file(files / "state.pth", state, voice.model)
    voices = [voice, state_voice("state", files / "state.pth", voice, base)]
    voices += [adapter_voice(str(n), AdapterSource(files / f"{n}.safetensors"), voice, base, False) for n in range(4)]
    running = engine_of(voice, batch=12)
    heard = [ask(running, own, prompt, GREEDY)[0] for own in voices for prompt in PROMPTS[:2]]
    running.step()
    assert len(running.groups) <= 1 + len(METHODS)
    finish(running)
    due = [alone(own, prompt, GREEDY) for own in voices for prompt in PROMPTS[:2]]
    for number in range(len(METHODS)):  # the merged model, as `generate --adapter` has it
        merged = Voice("", *load_model(files / "base.pth", [AdapterSource(files / f"{number}.safetensors")]))
        due[4 + 2 * number : 6 + 2 * number] = [alone(merged, prompt, GREEDY) for prompt in PROMPTS[:2]]
    assert [h.tokens for h in heard] == due and len(set(map(tuple, due))) == len(due)


def test_adapters_share_the_bases_weights_and_leave_them_as_they_are(files, voice):
    base = open_base(files / "base.pth")
    before = {key: tensor.clone() for key, tensor in voice.model.state_dict().items()}
    places = {key: tensor.data_ptr() for key, tensor in voice.model.state_dict().items()}
    for number, settings in enumerate(METHODS):
        own = adapter_voice("own", AdapterSource(files / f"{number}.safetensors"), voice, base, False)
        weights = own.model.state_dict()
        copies = {key for key in before if weights[key].data_ptr() != places[key]}
        if settings.get("method") != "pissa":
            trains = "ln" in settings.get("train_parts", ())
            assert copies == {key for key in before if trains and re.search(r"^head|\bln", key)}
    assert all(torch.equal(before[key], tensor) for key, tensor in voice.model.state_dict().items())


def test_an_adapter_of_another_base_is_no_voice(files, voice, tiny_state, tmp_path):
    save_model(tmp_path / "base.pth", tiny_state(seed=8))
    base = open_base(tmp_path / "base.pth")
    with pytest.raises(UserError, match="another base"):
        adapter_voice("own", AdapterSource(files / "0.safetensors"), voice, base, False)
