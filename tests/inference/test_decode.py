"""Decoding: each prompt gets the tokens it would get alone, from any state, with any adapter, in blocks too."""

import re

import pytest
import torch

from families import shaken
from inference.engines import GREEDY, PROMPTS, spread_logits
from inference.test_engine import adapter_file
from release.test_check import make_files
from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.adapters import AdapterSource
from rwkv_peft.checkpoints.base import base_of, open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.inference import engine, forward
from rwkv_peft.inference.decode import generate
from rwkv_peft.inference.forward import prefill
from rwkv_peft.inference.loading import load_model, read_state_file, save_state_file
from rwkv_peft.inference.settings import Sampling
from rwkv_peft.inference.speakers import Speaker, adapter_speaker
from rwkv_peft.inference.weights import rounded
from rwkv_peft.models import family_named
from rwkv_peft.models.rwkv6.model import RWKV6
from rwkv_peft.models.state import State
from rwkv_peft.ops.decode import CPU, quantize


@pytest.fixture(scope="module")
def model(tiny_state):
    state = spread_logits(tiny_state)
    model = RWKV6(base_of(state).config)
    model.load_state_dict(state)
    return model.requires_grad_(False)


def continuations(model, prompts, *arguments, **settings):
    """The tokens generated for each prompt."""
    found = [[] for _ in prompts]
    for step in generate(model, prompts, *arguments, **settings):
        found[step.number].append(step.token)
    return found


@pytest.mark.processor
def test_greedy_is_the_argmax_of_the_full_forward(model):
    growing = shaken(family_named("x070b"), 0.3, seed=2, n_embd=32, vocab_size=80, head_size=16)
    for one in (model, growing.double().requires_grad_(False)):
        for prompt, tokens in zip(PROMPTS, continuations(one, PROMPTS, GREEDY, 8, batch=3)):
            logits, _ = one(torch.tensor([prompt + tokens]))
            assert tokens == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(seed=5),
        Sampling(top_p=1.0, temperature=1.5, presence_penalty=1.0, frequency_penalty=0.5, penalty_decay=0.9),
        Sampling(top_k=7, top_p=0.95),
    ],
    ids=["greedy", "top_p", "penalties", "top_k"],
)
@pytest.mark.processor
def test_a_batch_equals_its_prompts_one_by_one(model, sampling):
    together = continuations(model, PROMPTS, sampling, 15)
    assert continuations(model, PROMPTS, sampling, 15, batch=1) == together
    assert continuations(model, PROMPTS, sampling, 15, batch=2) == together
    assert continuations(model, PROMPTS[:3], sampling, 15) == together[:3]


def test_a_seed_and_the_number_of_a_prompt_decide_the_draws(model):
    drawn = [continuations(model, [[5, 6]] * 3, Sampling(top_p=1.0, seed=seed), 10) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][1:] == drawn[2][:2] and drawn[0][0] != drawn[0][1]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_sequences_end_on_their_own(model, batch):
    free = continuations(model, PROMPTS, GREEDY, 20)
    lengths = [4, 1, 20, 7, 2]
    taken = [0] * 5

    def ends(number, token):
        taken[number] += 1
        return "enough" if taken[number] == lengths[number] else ""

    steps = list(generate(model, PROMPTS, GREEDY, 20, ends, batch=batch))
    for number, length in enumerate(lengths):
        own = [step for step in steps if step.number == number]
        assert [step.token for step in own] == free[number][:length]
        assert [step.end for step in own] == [""] * (length - 1) + ["enough"]


def test_neither_tokens_beyond_the_vocabulary_nor_penalized_ones_are_sampled(model):
    drawn = continuations(model, PROMPTS, Sampling(top_p=1.0, temperature=50.0), 20, vocab_size=10)
    assert max(max(tokens) for tokens in drawn) < 10
    (tokens,) = continuations(model, [[1]], Sampling(temperature=0, presence_penalty=1e6), 40)
    assert len(set(tokens)) == 40


def test_long_prompts_are_read_in_passes(model, monkeypatch):
    whole, state = prefill(model, PROMPTS)
    monkeypatch.setattr(forward, "PREFILL", 2 * len(PROMPTS))
    logits, again = prefill(model, PROMPTS)
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    for layer, other in zip(state, again):
        for tensor, same in zip(layer, other):
            torch.testing.assert_close(tensor, same, rtol=1e-4, atol=1e-4)


def test_going_on_from_a_saved_state_equals_continuing(model, tmp_path):
    whole = continuations(model, [PROMPTS[2]], GREEDY, 10)
    _, state = prefill(model, [PROMPTS[2][:5]])
    save_state_file(tmp_path / "session.pth", state, model)
    start = read_state_file(tmp_path / "session.pth", model)
    assert continuations(model, [PROMPTS[2][5:]], GREEDY, 10, start=start) == whole
    both = continuations(model, [PROMPTS[2][5:], PROMPTS[2][5:]], GREEDY, 10, start=start)
    assert both == whole * 2


def test_a_time_state_is_the_transpose_of_what_the_model_computes_with(model, tmp_path):
    _, state = prefill(model, [PROMPTS[2]])
    tuned = {f"blocks.{i}.att.time_state": layer.wkv[0].mT.contiguous() for i, layer in enumerate(state)}
    save_model(tmp_path / "state.pth", tuned)
    start = read_state_file(tmp_path / "state.pth", model)
    zeros = State.zeros(model.config, 1)
    for layer, own, zero in zip(start, state, zeros):
        assert torch.equal(layer.wkv, own.wkv)
        assert torch.equal(layer.att_shift, zero.att_shift) and torch.equal(layer.ffn_shift, zero.ffn_shift)
    save_model(tmp_path / "model.pth", model.state_dict() | tuned)
    _, inside = load_model(tmp_path / "model.pth")
    assert all(torch.equal(a.wkv, b.wkv) for a, b in zip(inside, start))


@pytest.mark.parametrize(
    "settings",
    [{"mode": "bat-in"}, {"mode": "bat-out"}, {"mode": "bone"}, {"method": "lora", "alpha": 16.0}],
    ids=lambda settings: settings.get("mode", "lora"),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.processor
def test_an_adapter_gives_the_tokens_of_the_merged_file(tiny_state, tmp_path, settings, dtype):
    base, adapter, merged = make_files(tmp_path, tiny_state(seed=3, dtype=dtype), 0.1, **settings)
    sampling = Sampling(top_p=0.9, seed=1)
    found = [
        continuations(load_model(path, [AdapterSource(adapter) for adapter in adapters])[0], PROMPTS, sampling, 15)
        for path, adapters in ((base, [adapter]), (merged, []), (base, []))
    ]
    assert found[0] == found[1] != found[2]


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(UserError, match="prompt 1 holds no token"):
        list(generate(model, [[1], []], GREEDY))


@pytest.mark.parametrize("batch", [1, 4, 7, 15])
def test_a_prompt_that_comes_again_is_read_once(model, monkeypatch, batch):
    """Its answers are those to copies of it, which are read one by one."""
    read, whole = [], engine.prefill
    monkeypatch.setattr(
        engine, "prefill", lambda m, prompts, start: (read.extend(prompts), whole(m, prompts, start))[1]
    )
    due = {10 * place + turn: prompt for place, prompt in enumerate(PROMPTS[:3]) for turn in range(5)}
    sampling = Sampling(top_p=1.0, seed=3)

    def answers(prompts):
        found = {}
        for step in generate(model, prompts, sampling, 8, lambda number, token: "end" * (token < 9), batch=batch):
            found.setdefault(step.number, []).append(step.token)
        return found

    once = answers(due)
    assert read == PROMPTS[:3]
    assert once == answers({number: list(prompt) for number, prompt in due.items()}) and len(read) == 3 + 15
    assert len(set(map(tuple, once.values()))) > 5


def test_tokens_have_their_log_probability_and_entropy(model):
    sampling = Sampling(temperature=0.7, top_p=0.8, measured=True)
    for number, prompt in enumerate(PROMPTS[:3]):
        row = list(prompt)
        for step in generate(model, {number: prompt}, sampling, 6):
            found = (model(torch.tensor([row]))[0][0, -1].double() / 0.7).log_softmax(-1)
            assert step.logprob == pytest.approx(found[step.token].item(), abs=1e-4)
            assert step.entropy == pytest.approx(-(found.exp() * found).sum().item(), abs=1e-4)
            row.append(step.token)


@pytest.fixture
def path(tiny_state, tmp_path):
    save_model(tmp_path / "model.pth", tiny_state(seed=3))
    return tmp_path / "model.pth"


def logits(model):
    return prefill(model, PROMPTS[:3])[0]


@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.processor
def test_a_model_computes_with_the_rounded_matrices(path, tmp_path, monkeypatch, bits):
    told = []
    model, _ = load_model(path, weights=f"int{bits}", log=told.append)
    tensors = dict(open_base(path).tensors)
    names = [f"{name}.weight" for name in rounded(model)]
    assert len(names) == 17 and "head.weight" in names  # eight a layer
    for name in names:
        tensors[name] = quantize(tensors[name], bits).dequantized()
    save_model(tmp_path / "dequantized.pth", tensors)
    plain, _ = load_model(tmp_path / "dequantized.pth")
    due, given = logits(plain), logits(load_model(path)[0])
    assert (logits(model) - due).norm() < 0.02 * due.norm()  # activations are rounded, too
    steps = [list(generate(one, PROMPTS[:3], Sampling(temperature=0), 5)) for one in (model, plain)]
    assert steps[0] == steps[1]
    monkeypatch.setattr(CPU, "unavailable", lambda: "no compiler")
    torch.testing.assert_close(logits(model), due, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(due, given, rtol=1e-3, atol=1e-3)
    assert re.fullmatch(rf"int{bits} blocks of 32: 0.3 -> 0.\d MB in 17 matrices", *told)


@pytest.mark.parametrize("settings", [{"mode": "bat-in"}, {"method": "lora", "alpha": 16.0, "train_parts": ("head",)}])
def test_a_voice_on_rounded_weights_has_its_own_of_what_the_adapter_changes(path, tmp_path, settings):
    adapter = AdapterSource(adapter_file(path, tmp_path / "adapter.safetensors", **settings))
    base = open_base(path)
    model, _ = load_model(path, weights="int8")
    before = logits(model)
    speaker = adapter_speaker("own", adapter, Speaker("base", model), base, False)
    merged, _ = load_model(path, [adapter], weights="int8")
    assert torch.equal(logits(speaker.model), logits(merged))
    assert torch.equal(logits(model), before) and not torch.equal(before, logits(merged))
    shared = [name for name, module in rounded(model).items() if rounded(speaker.model)[name] is module]
    assert shared == ([] if "train_parts" in settings else ["head"])


def test_widths_that_are_no_blocks_are_refused(tiny_state, tmp_path):
    save_model(tmp_path / "odd.pth", tiny_state(dim_ffn=80))
    with pytest.raises(UserError, match=r"--weights int4: blocks\.0\.ffn\.value has rows of 80 .* leave the flag out"):
        load_model(tmp_path / "odd.pth", weights="int4")


def test_blocks_move_with_the_model_and_stay_what_they_are(path, tmp_path):
    """To memory without data, which a GPU's kernels are planned with."""
    model, _ = load_model(path, device="meta", precision="bf16", weights="int8")
    blocks = model.head.weight
    assert blocks.words.dtype == torch.int32 and blocks.words.is_meta and model.emb.weight.is_meta
    for rows in (1, 40):
        found, _ = model(torch.zeros(rows, 1, dtype=torch.long, device="meta"))
        assert found.dtype == torch.bfloat16 and found.shape == (rows, 1, model.config.vocab_size)
    adapter = AdapterSource(adapter_file(path, tmp_path / "adapter.safetensors", mode="bat-in"))
    speaker = adapter_speaker("own", adapter, Speaker("base", model), open_base(path), False)
    assert all(product.weight.words.is_meta for product in rounded(speaker.model).values())


def test_an_adapter_of_another_base_is_refused(tiny_state, tmp_path):
    save_model(tmp_path / "base.pth", tiny_state())
    metadata = AdapterMetadata("bone", rank=8, base_fingerprint="0" * 32)
    save_adapter(tmp_path / "a.safetensors", {"blocks.0.att.key.bone": torch.ones(8, 64)}, metadata)
    with pytest.raises(UserError, match="another base"):
        load_model(tmp_path / "base.pth", [AdapterSource(tmp_path / "a.safetensors")])
    load_model(tmp_path / "base.pth", [AdapterSource(tmp_path / "a.safetensors")], any_base=True)
