"""RWKV-7 with attention over deep embeddings: above all its State, which grows with the tokens; and rows of frozen
tables."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.plain import random_tensors
from rwkv_peft.checkpoints.base import base_of
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models import family_named
from rwkv_peft.models.rwkv7b import model as rwkv7b
from rwkv_peft.models.state import State, is_time_state, state_of, state_tensors
from rwkv_peft.training.step.shared_prefix import GatherRows

FAMILY = family_named("x070b")
CPU = torch.device("cpu")
SIZES = {"n_layer": 2, "n_embd": 16, "vocab_size": 20, "head_size": 8, "dim_ffn": 24}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Several bands of scores in short rows."""
    monkeypatch.setattr(rwkv7b, "BAND", 4)


@pytest.fixture
def model():
    return FAMILY.load(*random_tensors(FAMILY, **SIZES))


def row(length, seed=1):
    return torch.randint(20, (1, length), generator=torch.Generator().manual_seed(seed))


class TokensFromMeta(TorchDispatchMode):
    """Let the meta device stand for a GPU: tokens are copied from it, each time as zeros, and counted."""

    copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == CPU:
            self.copies += 1
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad_checkpoint", (False, True))
@pytest.mark.parametrize("version", ("x070a", "x070b"))
def test_a_step_copies_its_tokens_to_frozen_tables_once(version, grad_checkpoint):
    """Each copy from a GPU waits for it."""
    family = family_named(version)
    model = family.load(*random_tensors(family, dtype=torch.bfloat16, **SIZES), grad_checkpoint)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_emb." not in name)
    model.settle()
    model.to("meta")
    with TokensFromMeta() as tokens:
        logits, _ = model(torch.empty(2, 5, dtype=torch.long, device="meta"))
        logits.sum().backward()
    assert tokens.copies == 1


def test_a_sequence_in_parts_of_odd_sizes_is_the_whole_with_its_gradients(model):
    tokens = row(30)
    whole, end = model(tokens)
    gradients = torch.autograd.grad(whole.square().sum(), list(model.blocks[0].qkv.parameters()))
    parts, state = [], None
    for part in tokens.split([1, 12, 1, 3, 13], 1):
        logits, state = model(part, state)
        parts.append(logits)
    parts = torch.cat(parts, 1)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(tuple(state[1]), tuple(end[1]))
    again = torch.autograd.grad(parts.square().sum(), list(model.blocks[0].qkv.parameters()))
    torch.testing.assert_close(again, gradients)


@torch.no_grad()
def test_packed_sequences_see_only_their_own_tokens_and_go_on_in_any_order(model):
    lengths, rows = [7, 1, 12], [row(size, seed) for seed, size in enumerate((9, 5, 13))]
    begun = [one[:, :size] for one, size in zip(rows, lengths)]
    packed, state = model(torch.cat(begun, 1), cu_seqlens=torch.tensor([0, 7, 8, 20]))
    whole = [model(one)[0] for one in rows]
    for found, due, size in zip(packed.split(lengths, 1), whole, lengths):
        torch.testing.assert_close(found, due[:, :size])
    assert state[0].length.tolist() == lengths and state[0].past_keys.shape[1] == 12
    # row by row, one row in the midst of the others anew, and packed with a sequence that begins there
    two = state.selected(torch.tensor([1, 0]))
    assert two[1].past_values.shape[1] == 7
    logits, _ = model(torch.stack([rows[1][0, 1:3], rows[0][0, 7:9]]), two)
    torch.testing.assert_close(logits, torch.stack([whole[1][0, 1:3], whole[0][0, 7:9]]))
    begun = torch.cat([rows[1][:, 1:4], rows[0][:, 7:8], rows[2]], 1)
    packed, after = model(begun, two, cu_seqlens=torch.tensor([0, 3, 4, 17]))
    torch.testing.assert_close(packed, torch.cat([whole[1][:, 1:4], whole[0][:, 7:8], whole[2]], 1))
    assert after[1].length.tolist() == [4, 8, 13]


@torch.no_grad()
def test_states_of_any_lengths_are_joined_repeated_and_put_in_place(model):
    states = [model(row(size, size))[1] for size in (3, 8, 5)]
    joined = states[0].joined(*states[1:])
    changed = joined.repeated(1).put(torch.tensor([0]), model(row(11))[1])
    for place in range(3):
        for one in (joined, joined.repeated(2).selected(torch.arange(0, 6, 2))):
            for found, due in zip(one.selected(torch.tensor([place]))[1], states[place][1]):
                torch.testing.assert_close(found, due)
        kept = model(row(11))[1] if place == 0 else states[place]
        torch.testing.assert_close(tuple(changed.selected(torch.tensor([place]))[0]), tuple(kept[0]))


def test_answers_hand_their_gradients_to_the_prompt_that_they_share(model):
    prompts, owner = [row(6, 1), row(2, 2)], torch.tensor([0, 0, 1])
    answers = [row(size, size) for size in (3, 4, 5)]
    bounds = torch.tensor([0, 3, 7, 12])
    _, state = model(torch.cat(prompts, 1), cu_seqlens=torch.tensor([0, 6, 8]))
    forked = state.each(lambda name, tensor: GatherRows.apply(tensor, owner))
    found = model(torch.cat(answers, 1), forked, bounds)[0]
    due = [model(torch.cat([prompts[own], one], 1))[0] for own, one in zip(owner, answers)]
    due = torch.cat([logits[:, prompts[own].shape[1] :] for own, logits in zip(owner, due)], 1)
    torch.testing.assert_close(found, due)
    used = [
        parameter for name, parameter in model.named_parameters() if "blocks.0.att.v" not in name or "weight" in name
    ]
    gradients = [torch.autograd.grad(logits.square().sum(), used) for logits in (found, due)]
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_a_saved_session_leads_back_and_others_are_refused(model):
    zeros = State.zeros(model.config, 1, dtype=torch.float64)
    saved = state_tensors(model(row(9))[1], False)
    assert saved["blocks.1.qkv.past_keys"].shape == (9, 256)
    read = state_of(saved, zeros, False, "the file")
    assert read[1].length.tolist() == [9]
    torch.testing.assert_close(tuple(state_tensors(read, False).values()), tuple(saved.values()))
    alone = state_of({key: value for key, value in saved.items() if is_time_state(key)}, zeros, False, "the file")
    assert alone[0].length.tolist() == [0] and alone[0].past_keys.shape == (1, 0, 256)
    key = "blocks.1.qkv.past_values"
    for other, words in (
        (saved[key][1:], r"of \[8, 9\] tokens"),
        (saved[key][:, 1:], r"past_values has shape \(9, 15\)"),
    ):
        with pytest.raises(UserError, match=words):
            state_of(saved | {key: other}, zeros, False, "the file")


@pytest.mark.parametrize("version, before", [("x070a", "x070"), ("x070b", "x070a")])
def test_a_new_model_is_the_generation_before_until_it_trains(version, before):
    torch.manual_seed(0)
    family, other = family_named(version), family_named(before)
    model = family.build(family.new_dimensions(**SIZES))
    family.init_weights(model)
    tensors = {key: model.state_dict()[key] for key in other.shapes(other.new_dimensions(**SIZES))}
    logits = model(torch.arange(12)[None])[0]
    torch.testing.assert_close(logits, other.load(tensors, other.config_of(tensors))(torch.arange(12)[None])[0])
    logits.square().sum().backward()
    assert version == "x070a" or model.blocks[0].qkv.lnv.weight.grad.any()


def test_what_a_file_is_comes_from_its_tensors():
    tensors, config = random_tensors(FAMILY, dtype=torch.float32, **SIZES)
    assert (base_of(tensors).family.name, base_of(tensors).config) == ("RWKV-7b", config)
    flat = {key: tensor.flatten() if ".qkv.x_" in key else tensor for key, tensor in tensors.items()}
    base = base_of(flat)
    tokens = row(5)
    assert torch.equal(FAMILY.load(flat, base.config)(tokens)[0], FAMILY.load(tensors, config)(tokens)[0])
    with pytest.raises(UserError, match=r"1 missing tensors \(blocks.1.qkv.k2\)"):
        base_of({key: tensor for key, tensor in tensors.items() if key != "blocks.1.qkv.k2"})


@pytest.mark.parametrize(
    "version, key, part, rate",
    [
        ("x070a", "blocks.1.ffn.s0", "time", (1.0, False)),
        ("x070a", "blocks.1.ffn.s_emb.weight", "emb", (1.0, True)),
        ("x070a", "blocks.1.ffn.s_emb_x.weight", "emb", (1.0, True)),
        ("x070a", "blocks.1.att.w0", "time", (2.0, False)),
        ("x070a", "emb.weight", "emb", (1.0, True)),
        ("x070a", "blocks.1.ffn.key.weight", None, (1.0, True)),
        ("x070b", "blocks.1.qkv.k2", "time", (1.0, False)),
        ("x070b", "blocks.1.qkv.v1", "time", (1.0, False)),
        ("x070b", "blocks.1.qkv.x_q", "time", (1.0, False)),
        ("x070b", "blocks.1.qkv.lnk.weight", "ln", (1.0, True)),
        ("x070b", "blocks.1.qkv.v_emb_x.weight", "emb", (1.0, True)),
        ("x070b", "blocks.1.qkv.qq.weight", None, (1.0, True)),
        ("x070b", "blocks.1.ffn.s0", "time", (1.0, False)),
    ],
)
def test_parts_and_rates_of_parameters(version, key, part, rate):
    family = family_named(version)
    assert (family.part_of(key), family.learning_rate(key)) == (part, rate)
