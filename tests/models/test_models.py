"""The models of every generation against its formulas in plain torch (plain.py), against stored logits of other
implementations, and by laws."""

import pytest
import torch
import torch.nn.functional as F

from models.plain import PLAIN, random_tensors
from rwkv_peft.checkpoints.base import base_of, open_base
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models import FAMILIES, family_named
from rwkv_peft.ops.mix import token_shift

SIZES = {"n_layer": 2, "n_embd": 16, "vocab_size": 20, "head_size": 8, "dim_ffn": 24}
FIRST_VALUE = {f"blocks.0.att.v{n}" for n in "012"}  # which nothing uses


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


def test_every_generation_is_written_out():
    assert set(PLAIN) == {family.version for family in FAMILIES}


@pytest.mark.parametrize("first_value, grad_checkpoint", [(True, False), (False, True)])
def test_logits_and_all_gradients_are_the_formulas(family, first_value, grad_checkpoint):
    tensors, config = random_tensors(family, first_value, **SIZES)
    tokens, targets = torch.arange(1, 12), torch.arange(2, 13)
    model = family.load({key: tensor.clone() for key, tensor in tensors.items()}, config, grad_checkpoint)
    own = {key: tensor.clone().requires_grad_() for key, tensor in tensors.items()}
    found, due = model(tokens[None])[0][0], PLAIN[family.version](own, config, tokens)
    for logits in (found, due):
        F.cross_entropy(logits, targets).backward()
    torch.testing.assert_close(found, due, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name in FIRST_VALUE
        else:
            assert parameter.grad.any(), name
            torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_low_precision_loses_no_more_than_plain_torch(family, dtype):
    tensors, config = random_tensors(family, dtype=dtype, **SIZES)
    tokens, formula = torch.arange(12), PLAIN[family.version]
    exact = formula({key: tensor.double() for key, tensor in tensors.items()}, config, tokens)
    error, plain = (
        (each.double() - exact).norm()
        for each in (family.load(tensors, config)(tokens[None])[0][0], formula(tensors, config, tokens))
    )
    assert error <= 2 * plain + torch.finfo(dtype).eps * exact.norm()


@torch.inference_mode()
def test_a_sequence_in_parts_and_packed_is_the_whole(family):
    model, tokens = family.load(*random_tensors(family, **SIZES)), torch.arange(30)[None] % 20
    whole, end = model(tokens)
    first, state = model(tokens[:, :17])
    rest, last = model(tokens[:, 17:], state)
    close = dict(rtol=1e-5, atol=1e-5)  # states are float32
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, **close)
    torch.testing.assert_close(tuple(last[1]), tuple(end[1]), **close)
    packed, _ = model(torch.cat([tokens[:, :17], tokens], 1), cu_seqlens=torch.tensor([0, 17, 47]))
    torch.testing.assert_close(packed, torch.cat([first, whole], 1), **close)


def test_a_new_models_blocks_start_as_the_identity(family):
    torch.manual_seed(0)
    model = family.build(family.new_dimensions(**SIZES))
    family.init_weights(model)
    tokens = torch.arange(5)[None]
    expected = model.head(model.ln_out(model.blocks[0].ln0(model.emb(tokens))))
    torch.testing.assert_close(model(tokens)[0], expected)


@pytest.mark.parametrize(
    "version, name, dtype, bound",
    [
        ("x060", "rwkv6_tiny_1m/rwkv6-tiny-1m-bf16.pth expected-logits-6v0-1m.bin", torch.float32, 2e-3),
        ("x070", "rwkv7_tiny_834k/rwkv7-tiny-834k-fp32.pth expected-logits-7v0-834k.bin", torch.float32, 1e-5),
        ("x070", "rwkv7_tiny_834k/rwkv7-tiny-834k-fp32.pth expected-logits-7v0-834k.bin", torch.float64, 1e-6),
    ],
)
def test_stored_logits_of_a_real_model(shared_data, version, name, dtype, bound):
    model_name, logits_name = name.split()
    path = shared_data / model_name
    base = open_base(path)
    expected = torch.frombuffer(bytearray((path.parent / logits_name).read_bytes()), dtype=torch.float32)
    model = family_named(version).load({key: x.to(dtype) for key, x in base.tensors.items()}, base.config)
    tokens, state = torch.tensor([list(b'"in')]), None
    with torch.inference_mode():
        assert (model(tokens)[0][0, -1] - expected).abs().max() < bound
        for position in range(3):
            logits, state = model(tokens[:, position : position + 1], state)
        assert (logits[0, -1] - expected).abs().max() < bound


def test_token_shift_takes_the_given_predecessor():
    x = torch.arange(6.0).view(1, 3, 2)
    assert token_shift(x).tolist() == [[[0, 0], [0, 1], [2, 3]]]
    assert token_shift(x, torch.tensor([[8.0, 9.0]])).tolist() == [[[8, 9], [0, 1], [2, 3]]]


def test_widths_come_from_the_file_and_not_from_a_formula():
    tensors, _ = random_tensors(family_named("x070"), first_value=False, dtype=torch.float32)
    for i in range(3):
        tensors |= {f"blocks.{i}.att.g1": torch.ones(32, 7), f"blocks.{i}.att.g2": torch.ones(7, 32)}
    found = base_of(tensors).config
    assert (found.gate_rank, found.first_value, found.head_size, found.n_head) == (7, False, 8, 4)


@pytest.mark.parametrize("key, words", [("blocks.0.ffn.enn.weight", "an RWKV-8"), ("blocks.1.ffn.rosa.emb", "ROSA")])
def test_other_architectures_are_refused_by_name(key, words):
    tensors, _ = random_tensors(family_named("x070"))
    with pytest.raises(UserError, match=words):
        base_of(tensors | {key: torch.ones(1)}, "the file")


def test_a_settled_table_stays_as_the_file_has_it_and_gives_the_same():
    family = family_named("x070a")
    tensors, config = random_tensors(family, dtype=torch.bfloat16, **SIZES)
    models = [family.load(tensors, config).requires_grad_(False) for _ in range(2)]
    models[0].settle()
    whole, settled = (model.float() for model in reversed(models))
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(settled(tokens)[0], whole(tokens)[0])
    names = [f"blocks.{i}.ffn.s_emb.weight" for i in (0, 1)]
    state, trained = settled.state_dict(), dict(settled.named_parameters())
    assert state.keys() == tensors.keys() and not any(name in trained for name in names)
    assert all(state[name].data_ptr() == tensors[name].data_ptr() for name in names)
    again = family.load(state, config)  # it trains in another model
    again.settle()
    assert all(name in dict(again.named_parameters()) for name in names)
